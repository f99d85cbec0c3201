// A kernel on the current device, as the host sees it: whether its code runs there, what this code
// was compiled for, and attributes that are set once.
#pragma once

#include "cuda/platform/compiler.cuh"

#if !defined(FASTRNN_CUDASIM)
#include <map>
#include <mutex>
#include <utility>
#endif

namespace fastrnn {
namespace platform {

struct KernelFacts {
  int error = 0;  // a cudaError_t: there is no such code, or the driver is too old
  // What the code in use was compiled for, 90 for compute capability 9.0. It may be older than the
  // GPU, if the driver compiled it from PTX: then it lacks all that FASTRNN_CLUSTERS guards.
  int architecture = 0;
  bool clusters() const { return architecture >= 90; }
};

#if defined(FASTRNN_CUDASIM)

inline KernelFacts facts_of(const void*) { return {0, 90}; }

#else

// The first call for a kernel and a device allows the kernel all shared memory of a block and the
// largest clusters, so that launches of several threads and sizes need not set anything.
inline KernelFacts facts_of(const void* function) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelFacts> known;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error == cudaSuccess) {
    const auto found = known.find({function, device});
    if (found != known.end()) return found->second;
  }
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  }
  const KernelFacts facts{error, attributes.ptxVersion};
  if (error == cudaSuccess) {
    // A GPU without clusters of 16 may refuse this; resident_clusters then counts none.
    if (facts.clusters())
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    known[{function, device}] = facts;
  }
  // Clears the error, which the next call of any library would report otherwise.
  cudaGetLastError();
  return facts;
}

#endif

}  // namespace platform
}  // namespace fastrnn
