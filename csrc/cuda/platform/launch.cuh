// Launches and their overlap; memory and clusters of the device, as the host sees them.
#pragma once

#include <tuple>
#include <utility>

#include "cuda/platform/compiler.cuh"
#include "cuda/platform/kernel.cuh"

namespace fastrnn {
namespace platform {

// ---- Launches that overlap ---------------------------------------------------------------------

// Waits for the results of the previous launch, in a launch with `Launch::overlaps`.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(FASTRNN_CLUSTERS)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin; its blocks wait for this one in wait_for_previous_launch().
__device__ __forceinline__ void allow_next_launch() {
#if defined(FASTRNN_CLUSTERS)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- The host ----------------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks of a cluster, along x
  bool cooperative = false;  // all blocks run at the same time, or the launch fails
  bool overlaps = false;     // may begin before the previous launch ends, if that allows it, and if
                             // the kernel's code waits for it in wait_for_previous_launch()
};

// Returns 0 or a cudaError_t. In the simulator the kernel has run when this returns.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& how, void* stream, Arguments... arguments) {
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
#if defined(FASTRNN_CUDASIM)
  (void)stream;
  return sim::launch({how.grid, how.block, how.shared_bytes, how.cluster, how.cooperative},
                     [&] { std::apply(kernel, values); });
#else
  const auto function = reinterpret_cast<const void*>(kernel);
  const KernelFacts facts = facts_of(function);
  cudaError_t error = static_cast<cudaError_t>(facts.error);
  // Its code would end in a trap, which takes the whole context down.
  if (error == cudaSuccess && how.cluster > 1 && !facts.clusters()) error = cudaErrorNotSupported;
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[3];
    cudaLaunchConfig_t config{};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = how.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (how.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    if (how.overlaps && facts.clusters()) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    void* pointers[sizeof...(Parameters) + 1];
    std::apply(
        [&](auto&... value) {
          size_t i = 0;
          ((pointers[i++] = const_cast<void*>(static_cast<const void*>(&value))), ...);
        },
        values);
    error = cudaLaunchKernelExC(&config, function, pointers);
  }
  // Clears the error of this launch, which the next call of any library would report otherwise.
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
#endif
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           unsigned cluster, bool cooperative, void* stream, Arguments... arguments) {
  return launch(kernel, Launch{grid, block, shared_bytes, cluster, cooperative}, stream,
                arguments...);
}

// Sets memory of the device to zero.
inline int clear(void* p, size_t bytes, void* stream) {
#if defined(FASTRNN_CUDASIM)
  (void)stream;
  return sim::clear(p, bytes);
#else
  return cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
#endif
}

// Copies within the device.
inline int copy(void* to, const void* from, size_t bytes, void* stream) {
#if defined(FASTRNN_CUDASIM)
  (void)stream;
  return sim::copy(to, from, bytes);
#else
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                         static_cast<cudaStream_t>(stream));
#endif
}

// Whether a CUDA graph is captured on a stream. Also true where CUDA does not tell, as for the
// default stream during a capture elsewhere.
inline bool capturing(void* stream) {
#if defined(FASTRNN_CUDASIM)
  (void)stream;
  return false;
#else
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) cudaGetLastError();
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
#endif
}

// The number of clusters of `blocks` blocks of a kernel that run at the same time on the current
// device; 0 if it or the kernel's code has no clusters, a negative cudaError_t for an error.
template <class... Parameters>
int resident_clusters(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes) {
#if defined(FASTRNN_CUDASIM)
  (void)kernel, (void)threads;
  return sim::resident_clusters(blocks, shared_bytes);
#else
  const auto function = reinterpret_cast<const void*>(kernel);
  const KernelFacts facts = facts_of(function);
  if (facts.error != 0) return -facts.error;
  if (!facts.clusters()) return 0;
  int clusters = 0;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  cudaGetLastError();
  return error == cudaSuccess ? clusters : -static_cast<int>(error);
#endif
}

inline const char* error_text(int error) {
#if defined(FASTRNN_CUDASIM)
  return sim::error_text(error);
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace platform
}  // namespace fastrnn
