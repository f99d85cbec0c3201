// Asynchronous copies, flags in global memory, barriers of a block, and clusters.
#pragma once

#include "cuda/platform/compiler.cuh"

namespace fastrnn {
namespace platform {

// ---- Asynchronous copies from global to shared memory ------------------------------------------

// Copies 16 bytes, both addresses aligned to 16; if not `valid`, reads nothing and writes zeros.
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

// Waits until all but the last kGroups groups of this thread have arrived; other threads see them
// only after a barrier.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
#if defined(FASTRNN_CUDASIM)
  sim::copy_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- Waiting -----------------------------------------------------------------------------------

// In a build with FASTRNN_WATCHDOG, a thread that has waited for two seconds for what another one
// should have sent ends the kernel: an error, in place of a GPU that hangs.
struct Watch {
#if defined(FASTRNN_WATCHDOG) && defined(__CUDA_ARCH__)
  uint64_t begin = now();
  static __device__ __forceinline__ uint64_t now() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
  }
  __device__ __forceinline__ void look() const {
    if (now() - begin > 2000000000) __trap();
  }
#else
  __device__ __forceinline__ void look() const {}
#endif
};

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

// Loads 16 bytes from the L2 cache: writes of other multiprocessors do not reach the L1 cache.
__device__ __forceinline__ uint4 load_shared_by_all(const void* p) {
#if defined(FASTRNN_CUDASIM)
  return *static_cast<const uint4*>(p);
#else
  // Not __ldcg: not every toolkit says that it reads anew each time.
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

// A barrier of `threads` threads of the block, whole warps. Barrier 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(unsigned id, unsigned threads) {
#if defined(FASTRNN_CUDASIM)
  sim::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// An mbarrier's phase ends when `count` threads have arrived and all bytes that they announced have
// come. Phases are counted from 0: `barrier_wait(b, n % 2)` waits for the end of phase n.
__device__ __forceinline__ void barrier_init(uint64_t* b, unsigned count) {
#if defined(FASTRNN_CUDASIM)
  sim::barrier_init(b, count);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
#endif
}

// Makes barriers visible to the cluster's other blocks, together with a cluster_sync.
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
  const Watch watch;
  do {
    watch.look();
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

// The barrier of all threads of a cluster, in two halves. Between them a thread may do anything but
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

// Stores into a block of the cluster, asynchronously, then counts the bytes on the barrier, which
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

}  // namespace platform
}  // namespace fastrnn
