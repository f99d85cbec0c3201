// Runs CUDA kernels on the CPU, for tests. Every CUDA thread is a fiber, and all fibers share one
// thread of the system. They switch where a GPU's threads wait for each other, in an order that a
// seed decides. Shared memory starts as NaN; copies and stores that a GPU makes asynchronously land
// at some later time. Kernels call csrc/cuda/platform.cuh, which calls the functions of this file.
//
// Kernels may be compiled with -fsanitize=address or thread. The sources of this folder must not
// be, because they tell the sanitizers themselves what those should know. So this file has all code
// that touches the kernels' memory, inline.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "shared memory is declared with FASTRNN_SHARED");

namespace fastrnn {
namespace sim {

struct Block;

struct Thread {
  uint3 index;
  unsigned lane;
  Block* block;
};

struct BlockFacts {
  uint3 index;
  unsigned rank;  // in the cluster
  unsigned char* shared;
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  bool cooperative;
};

extern Thread* self;  // the thread that runs now
extern Shape shape;   // of the kernel that runs now
extern int planted;   // the number of the planted fault that is on; 0 for none
const BlockFacts& facts();

inline unsigned char* shared() { return facts().shared; }
inline unsigned cluster_rank() { return facts().rank; }
inline unsigned cluster_blocks() { return shape.cluster; }

// Ends the kernel: the launch returns an error that error_text explains.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

int launch(const Shape& shape, void (*kernel)(void*), void* context);
int clear(void* p, size_t bytes);
int copy(void* to, const void* from, size_t bytes);
int resident_clusters(int blocks, size_t shared_bytes);
const char* error_text(int error);

template <class Kernel>
int launch(const Shape& shape, Kernel kernel) {
  return launch(shape, [](void* context) { (*static_cast<Kernel*>(context))(); }, &kernel);
}

// ---- Waiting -----------------------------------------------------------------------------------

void named_barrier(unsigned id, unsigned threads);
void block_barrier();
void cluster_arrive();
void cluster_wait();
void polled(const uint32_t* flag, uint32_t value);
void released();

// All lanes of `mask` meet. The last to come calls `combine`, with the `mine` of each lane at
// lanes[lane]. If `orders`, a lane afterwards sees what the others wrote before.
void meet(const char* name, unsigned mask, void* mine, void (*combine)(void** lanes), bool orders);

// ---- Matrix products ---------------------------------------------------------------------------

enum class Product { kBfloat16, kFloat16, kTf32 };
void mma(Product product, float* d, const uint32_t* a, const uint32_t* b);

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fffffff;
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

template <class T>
void store_bits(T* p, T value) {
  if constexpr (sizeof(T) == 2) {
    typedef unsigned short __attribute__((may_alias)) Bits;
    Bits bits;
    std::memcpy(&bits, &value, 2);
    *reinterpret_cast<volatile Bits*>(p) = bits;
  } else {
    *p = value;
  }
}

// ---- Memory: these functions read and write where a sanitizer sees it --------------------------

typedef uint32_t Vector16 __attribute__((vector_size(16), may_alias));
typedef uint64_t __attribute__((may_alias)) AliasedBarrier;

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment);
void check_aligned(const char* what, const void* p, size_t alignment);
void exchange_rows(uint32_t* r, Vector16 row, bool transposed);

inline void ldmatrix4(uint32_t (&r)[4], const void* row) {
  check_shared("ldmatrix4", row, 16, 16);
  exchange_rows(r, *static_cast<const volatile Vector16*>(row), false);
}

inline void ldmatrix4_transposed(uint32_t (&r)[4], const void* row) {
  check_shared("ldmatrix4_transposed", row, 16, 16);
  exchange_rows(r, *static_cast<const volatile Vector16*>(row), true);
}

// Whether a copy lands at once. Otherwise it waits until next_copy takes it.
bool copy_begins(void* shared, const void* global, bool valid);
struct Copy {
  void* shared;
  const void* global;  // null for zeros
};
bool next_copy(int groups_left, Copy* copy);
void copy_async_commit();

inline void land(const Copy& copy) {
  const Vector16 vector =
      copy.global ? *static_cast<const volatile Vector16*>(copy.global) : Vector16{};
  *static_cast<volatile Vector16*>(copy.shared) = vector;
}

inline void copy_async16(void* shared, const void* global, bool valid) {
  check_shared("copy_async16", shared, 16, 16);
  check_aligned("copy_async16", global, 16);
  if (copy_begins(shared, global, valid)) land({shared, valid ? global : nullptr});
}

inline void copy_async_wait(int groups_left) {
  Copy copy;
  while (next_copy(groups_left, &copy)) land(copy);
}

uint64_t new_barrier(uint64_t* b, unsigned count);
void barrier_arrive(uint64_t* b, uint64_t value, unsigned bytes);
bool barrier_passed(uint64_t* b, uint64_t value, unsigned parity);  // waits if not

inline void barrier_init(uint64_t* b, unsigned count) {
  check_shared("barrier_init", b, 8, 8);
  *reinterpret_cast<volatile AliasedBarrier*>(b) = new_barrier(b, count);
}

inline void barrier_expect(uint64_t* b, unsigned bytes) {
  check_shared("barrier_expect", b, 8, 8);
  barrier_arrive(b, *reinterpret_cast<volatile AliasedBarrier*>(b), bytes);
}

inline void barrier_wait(uint64_t* b, unsigned parity) {
  check_shared("barrier_wait", b, 8, 8);
  while (!barrier_passed(b, *reinterpret_cast<volatile AliasedBarrier*>(b), parity)) {
  }
}

uint32_t peer_address(const void* shared, unsigned rank);
void st_async16(uint32_t peer_data, const void* value, uint32_t peer_barrier);

// ---- Builtins of CUDA --------------------------------------------------------------------------

// Replaces the value, of up to 16 bytes, by that of lane `source`.
void shuffle_bytes(const char* name, unsigned mask, void* value, size_t bytes, unsigned source);
unsigned ballot(unsigned mask, bool predicate);

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 16);
  shuffle_bytes(name, mask, &value, sizeof(T), source);
  return value;
}

}  // namespace sim
}  // namespace fastrnn

#define threadIdx (::fastrnn::sim::self->index)
#define blockIdx (::fastrnn::sim::facts().index)
#define blockDim (::fastrnn::sim::shape.block)
#define gridDim (::fastrnn::sim::shape.grid)

inline void __syncthreads() { fastrnn::sim::block_barrier(); }

inline void __syncwarp(unsigned mask = ~0u) {
  fastrnn::sim::meet("__syncwarp", mask, nullptr, nullptr, true);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = static_cast<int>(fastrnn::sim::self->lane) & ~(width - 1);
  return fastrnn::sim::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
  return fastrnn::sim::shuffle("__shfl_xor_sync", mask, value, fastrnn::sim::self->lane ^ bits);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = fastrnn::sim::self->lane, from = lane + distance;
  const bool inside = from / width == lane / width;
  return fastrnn::sim::shuffle("__shfl_down_sync", mask, value, inside ? from : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = fastrnn::sim::self->lane, from = lane - distance;
  const bool inside = from <= lane && from / width == lane / width;
  return fastrnn::sim::shuffle("__shfl_up_sync", mask, value, inside ? from : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return fastrnn::sim::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
