// What differs between a GPU and the simulator of the tests, spelled twice: inline PTX, builtins,
// launches. A kernel uses these and plain C++, no more: the same file is compiled by nvcc, and by a
// C++ compiler with -DFASTRNN_CUDASIM, to run on the CPU (tests/cudasim).
//
// Clusters, mbarriers and asynchronous stores need compute capability 9.0. Below that these
// functions trap, so that every kernel compiles for every GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#if defined(FASTRNN_CUDASIM)
#include "cudasim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Declares `T* name`, the dynamic shared memory of the block. There is no other shared memory.
#if defined(FASTRNN_CUDASIM)
#define FASTRNN_SHARED(T, name) T* const name = reinterpret_cast<T*>(::fastrnn::sim::shared())
#else
#define FASTRNN_SHARED(T, name)                                     \
  extern __shared__ __align__(128) unsigned char fastrnn_shared_[]; \
  T* const name = reinterpret_cast<T*>(fastrnn_shared_)
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTRNN_CLUSTERS 1
#endif

namespace fastrnn {
namespace dev {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// ---- Numbers -----------------------------------------------------------------------------------

// A stored number as the type that sums are in.
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

namespace detail {
template <class T>
struct Rounded {
  template <class V>
  static __device__ __forceinline__ T of(V v) {
    return static_cast<T>(v);
  }
};
template <>
struct Rounded<bfloat16> {
  static __device__ __forceinline__ bfloat16 of(float v) { return __float2bfloat16_rn(v); }
  static __device__ __forceinline__ bfloat16 of(double v) { return __double2bfloat16(v); }
};
template <>
struct Rounded<float16> {
  static __device__ __forceinline__ float16 of(float v) { return __float2half_rn(v); }
  static __device__ __forceinline__ float16 of(double v) { return __double2half(v); }
};
}  // namespace detail

// Rounded to nearest.
template <class T, class V>
__device__ __forceinline__ T from_float(V v) {
  return detail::Rounded<T>::of(v);
}

template <class T, class V>
__device__ __forceinline__ void store(T* p, V v) {
  const T rounded = from_float<T>(v);
#if defined(FASTRNN_CUDASIM)
  // GCC's thread sanitizer does not see an assignment of the result of a call to a class.
  sim::store_bits(p, rounded);
#else
  *p = rounded;
#endif
}

// Rounded to TF32, ties away from zero: the bits of a float of which the last 13 are zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(FASTRNN_CUDASIM)
  return sim::to_tf32(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// The GPU's own functions, with errors of a few units in the last place; `rough_tanh` has 11 bits.
__device__ __forceinline__ float exp2(float x) {
#if defined(FASTRNN_CUDASIM)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float reciprocal(float x) {
#if defined(FASTRNN_CUDASIM)
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
__device__ __forceinline__ float rough_tanh(float x) {
#if defined(FASTRNN_CUDASIM)
  const uint32_t bits = sim::to_tf32(std::tanh(x));
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The same bits, of which the compiler does not know that they are: what follows from them is
// computed here, not before a loop, where it would take registers throughout.
__device__ __forceinline__ uint32_t opaque(uint32_t bits) {
#if !defined(FASTRNN_CUDASIM)
  asm volatile("" : "+r"(bits));
#endif
  return bits;
}

// ---- Matrix products of a warp -----------------------------------------------------------------
//
// With g = lane / 4 and q = lane % 4, for both shapes
//   d[0], d[1]: row g, columns 2q and 2q + 1 of [16][8];  d[2], d[3]: row g + 8.
// m16n8k16: a[0]: row g, columns 2q, 2q + 1 of [16][16] (the lower column in the lower half);
//   a[1]: row g + 8;  a[2], a[3]: these rows, columns + 8.
//   b[0]: rows 2q, 2q + 1, column g of [16][8];  b[1]: rows + 8.
// m16n8k8: a[0]: row g, column q of [16][8];  a[1]: row g + 8;  a[2], a[3]: these rows, column + 4.
//   b[0]: row q, column g of [8][8];  b[1]: row + 4.

#if defined(FASTRNN_CUDASIM)
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  sim::mma(sim::Product::kBfloat16, d, a, b);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  sim::mma(sim::Product::kFloat16, d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  sim::mma(sim::Product::kTf32, d, a, b);
}
#else
#define FASTRNN_MMA(shape, types)                      \
  asm("mma.sync.aligned." shape ".row.col.f32." types  \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "            \
      "{%8,%9}, {%0,%1,%2,%3};"                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    bfloat16) {
  FASTRNN_MMA("m16n8k16", "bf16.bf16");
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    float16) {
  FASTRNN_MMA("m16n8k16", "f16.f16");
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  FASTRNN_MMA("m16n8k8", "tf32.tf32");
}
#undef FASTRNN_MMA
#endif

// Four matrices of [8 rows][16 bytes] from shared memory: lane l gives the address of row l % 8 of
// matrix l / 8 and gets, of each, bytes 4 (l % 4) .. + 3 of row l / 4.
__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], const void* row) {
#if defined(FASTRNN_CUDASIM)
  sim::ldmatrix4(r, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// The same of each matrix transposed: of 16-bit numbers [8][8], lane l gets those of rows 2 (l % 4)
// and the one below in column l / 4.
__device__ __forceinline__ void ldmatrix4_transposed(uint32_t (&r)[4], const void* row) {
#if defined(FASTRNN_CUDASIM)
  sim::ldmatrix4_transposed(r, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// ---- Copies from global to shared memory that run on their own ---------------------------------

// 16 bytes, both addresses aligned to 16; zeros, and no read, where not `valid`.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
#if defined(FASTRNN_CUDASIM)
  sim::copy_async16(shared, global, valid);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(FASTRNN_CUDASIM)
  sim::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last N groups of this thread have landed; for other threads to see them takes a
// barrier after that.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
#if defined(FASTRNN_CUDASIM)
  sim::copy_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- Flags in global memory --------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
#if defined(FASTRNN_CUDASIM)
  const uint32_t value = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  sim::polled(p, value);
  return value;
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return value;
#endif
}

// 16 bytes as they are in the L2 cache: what other multiprocessors write does not reach the first.
__device__ __forceinline__ uint4 load_shared_by_all(const void* p) {
#if defined(FASTRNN_CUDASIM)
  return *static_cast<const uint4*>(p);
#else
  // Not __ldcg, of which not every toolkit says that it reads anew each time.
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(p)));
  return value;
#endif
}

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
#if defined(FASTRNN_CUDASIM)
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  sim::released();
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value)
               : "memory");
#endif
}

// ---- Barriers of a block -----------------------------------------------------------------------

// For `threads` threads of the block, whole warps. Barrier 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(unsigned id, unsigned threads) {
#if defined(FASTRNN_CUDASIM)
  sim::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// An mbarrier's phase ends when `count` threads have arrived and all bytes that they said to expect
// have come. Phases are counted from 0: `barrier_wait(b, n % 2)` waits for the end of phase n.
__device__ __forceinline__ void barrier_init(uint64_t* b, unsigned count) {
#if defined(FASTRNN_CUDASIM)
  sim::barrier_init(b, count);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
#endif
}

// Makes barriers known to the cluster's other blocks, together with a cluster_sync.
__device__ __forceinline__ void barrier_fence_init() {
#if !defined(FASTRNN_CUDASIM)
#if defined(FASTRNN_CLUSTERS)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
#endif
}

// Arrives, and adds to the bytes that the phase waits for.
__device__ __forceinline__ void barrier_expect(uint64_t* b, unsigned bytes) {
#if defined(FASTRNN_CUDASIM)
  sim::barrier_expect(b, bytes);
#elif defined(FASTRNN_CLUSTERS)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(address),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void barrier_wait(uint64_t* b, unsigned parity) {
#if defined(FASTRNN_CUDASIM)
  sim::barrier_wait(b, parity);
#elif defined(FASTRNN_CLUSTERS)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
#else
  __trap();
#endif
}

// ---- Clusters ----------------------------------------------------------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if defined(FASTRNN_CUDASIM)
  return sim::cluster_rank();
#elif defined(FASTRNN_CLUSTERS)
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_blocks() {
#if defined(FASTRNN_CUDASIM)
  return sim::cluster_blocks();
#elif defined(FASTRNN_CLUSTERS)
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}

// The barrier of all threads of a cluster in two halves. Between them a thread may do anything but
// arrive again.
__device__ __forceinline__ void cluster_arrive() {
#if defined(FASTRNN_CUDASIM)
  sim::cluster_arrive();
#elif defined(FASTRNN_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(FASTRNN_CUDASIM)
  sim::cluster_wait();
#elif defined(FASTRNN_CLUSTERS)
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address of the same place in another block's shared memory; bytes may be added to it.
__device__ __forceinline__ uint32_t peer_address(const void* shared, unsigned rank) {
#if defined(FASTRNN_CUDASIM)
  return sim::peer_address(shared, rank);
#elif defined(FASTRNN_CLUSTERS)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  return peer;
#else
  return 0;
#endif
}

// Stores into a block of the cluster, at some time; then counts the bytes on the barrier, which
// must lie in the same block. `peer_data` is aligned to 16 bytes.
__device__ __forceinline__ void st_async16(uint32_t peer_data, uint4 value, uint32_t peer_barrier) {
#if defined(FASTRNN_CUDASIM)
  sim::st_async16(peer_data, &value, peer_barrier);
#elif defined(FASTRNN_CLUSTERS)
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(peer_data),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(peer_barrier)
      : "memory");
#else
  __trap();
#endif
}

// ---- Launches that overlap ---------------------------------------------------------------------

// In a launch with `Launch::overlaps`: what follows needs the results of the launch before.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(FASTRNN_CLUSTERS)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may begin; its blocks wait for this one where they say so.
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
  bool overlaps = false;     // may begin before the launch before has ended, if that allows it
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
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (how.shared_bytes > kAlwaysAllowed) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared_bytes));
  }
  constexpr unsigned kPortableCluster = 8;
  if (error == cudaSuccess && how.cluster > kPortableCluster) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
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
    if (how.overlaps) {
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
  // Otherwise the error of this launch would also be that of the next call, whoever makes it.
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

// How many clusters of `blocks` blocks of a kernel run at the same time on the current device; 0
// where there are no clusters, a negative cudaError_t if that cannot be told.
template <class... Parameters>
int resident_clusters(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes) {
#if defined(FASTRNN_CUDASIM)
  (void)kernel, (void)threads;
  return sim::resident_clusters(blocks, shared_bytes);
#else
  const auto function = reinterpret_cast<const void*>(kernel);
  int device = 0, supported = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device);
  }
  if (error == cudaSuccess && !supported) return 0;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
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
    error = cudaOccupancyMaxActiveClusters(&clusters, function, &config);
  }
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

#if defined(FASTRNN_CUDASIM)
constexpr bool kSimulated = true;
#else
constexpr bool kSimulated = false;
#endif

}  // namespace dev
}  // namespace fastrnn
