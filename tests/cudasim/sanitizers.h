// What the simulator tells the address and the thread sanitizer about fibers, about the order of
// accesses, and about accesses that its own uninstrumented code makes.
#pragma once

#if defined(CUDASIM_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <cstddef>
#include <vector>

#if defined(CUDASIM_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_read_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

#pragma GCC visibility push(hidden)

namespace fastrnn {
namespace sim {

#if defined(CUDASIM_THREAD)
// What a thread does before it releases a token comes before what another does after it acquires
// the token. Every token is an address of its own.
inline void release(void* token) { __tsan_release(token); }
inline void acquire(void* token) { __tsan_acquire(token); }

// While one exists, the sanitizer ignores the simulator's own bookkeeping. It would see malloc and
// memmove even in code that is not instrumented.
class Quiet {
 public:
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
constexpr unsigned kNoOrder = 1;  // a switch of fibers orders nothing

// The sanitizer's state of a thread takes a millisecond to make, so it serves again: in another
// launch, or in another block of a launch that has very many.
class Clocks {
 public:
  void begin_launch() {
    used_ = 0;
    release(&start_token_);
  }
  void begin_batch(size_t threads) {
    constexpr size_t kEnough = 2048;
    if (used_ + threads > kEnough) used_ = 0;
  }
  void* take() {
    const Quiet quiet;
    if (used_ == clocks_.size()) clocks_.push_back(__tsan_create_fiber(0));
    return clocks_[used_++];
  }
  // What happened before the launch comes before what the current thread does.
  void begin_thread() { acquire(&start_token_); }

 private:
  std::vector<void*> clocks_;
  size_t used_ = 0;
  char start_token_ = 0;
};
inline Clocks clocks;
#else
inline void release(void*) {}
inline void acquire(void*) {}
class Quiet {
 public:
  Quiet() {}
};
#endif

}  // namespace sim
}  // namespace fastrnn

#pragma GCC visibility pop
