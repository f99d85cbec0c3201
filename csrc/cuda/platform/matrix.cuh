// Matrix products of a warp, and loads of their operands from shared memory.
#pragma once

#include "cuda/platform/compiler.cuh"

namespace fastrnn {
namespace platform {

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

#if !defined(FASTRNN_CUDASIM)
#define FASTRNN_LDMATRIX(shape)                                                         \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" shape ".shared.b16 {%0,%1,%2,%3}, [%4];" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                         \
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))              \
               : "memory")
#endif

// Loads four matrices of [8 rows][16 bytes] from shared memory: lane l gives the address of row
// l % 8 of matrix l / 8, and gets bytes 4 (l % 4) .. + 3 of row l / 4 of each.
__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], const void* row) {
#if defined(FASTRNN_CUDASIM)
  sim::ldmatrix4(r, row);
#else
  FASTRNN_LDMATRIX("");
#endif
}

// The same with each matrix, of 16-bit numbers [8][8], transposed: lane l gets those of rows
// 2 (l % 4) and 2 (l % 4) + 1 in column l / 4.
__device__ __forceinline__ void ldmatrix4_transposed(uint32_t (&r)[4], const void* row) {
#if defined(FASTRNN_CUDASIM)
  sim::ldmatrix4_transposed(r, row);
#else
  FASTRNN_LDMATRIX(".trans");
#endif
}
#undef FASTRNN_LDMATRIX

}  // namespace platform
}  // namespace fastrnn
