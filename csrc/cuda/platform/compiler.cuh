// The compilers, nvcc and the simulator's: headers, the shared memory of a block, 16-bit types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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
namespace platform {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#if defined(FASTRNN_CUDASIM)
constexpr bool kSimulated = true;
#else
constexpr bool kSimulated = false;
#endif

// Whether the code that is being compiled has clusters: in device code, that for GPUs from 9.0 on.
#if defined(FASTRNN_CUDASIM) || defined(FASTRNN_CLUSTERS)
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;
#endif

}  // namespace platform
}  // namespace fastrnn
