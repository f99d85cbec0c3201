// Waiting without sleep.
#pragma once

#include "core/storage.h"

namespace fastrnn {

// Belongs in the body of a spin loop.
FASTRNN_INLINE void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace fastrnn
