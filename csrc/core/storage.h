// How a number is stored in memory, as opposed to the type it is computed in.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTRNN_INLINE __forceinline__
#else
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fastrnn {

enum class Storage : int32_t {
  kSame = 0,      // stored as computed: float or double
  kBfloat16 = 1,  // computed in float
  kFloat16 = 2,   // computed in float
};

}  // namespace fastrnn
