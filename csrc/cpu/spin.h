// Waiting without sleep.
#pragma once

#include <time.h>

#include <cstdint>

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

// By a clock that never goes back. Takes about 25 ns.
inline int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// How many times as long threads wait, for tools that make them slow.
#ifndef FASTRNN_PATIENCE
#define FASTRNN_PATIENCE 1
#endif

// Nanoseconds. A thread that is waited for longer has lost its core: this is far less than a time
// slice. At the start it may still have to wake up.
constexpr int64_t kLate = 200'000 * FASTRNN_PATIENCE;
constexpr int64_t kLateAtStart = 1'000'000 * FASTRNN_PATIENCE;

}  // namespace fastrnn
