// Fibers: their stacks, the switch from one to another, and the function in which each starts. No
// fiber is chosen here.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "machine.h"

namespace fastrnn {
namespace sim {
namespace {

constexpr size_t kPage = 4096;

#if !defined(__x86_64__)
#error "the simulator switches stacks as x86-64 does"
#endif

extern "C" void fastrnn_cudasim_switch(void** save, void* load);
asm(R"(
.text
.local fastrnn_cudasim_switch
.type fastrnn_cudasim_switch, @function
fastrnn_cudasim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastrnn_cudasim_switch, . - fastrnn_cudasim_switch
)");

}  // namespace

void switch_to(Fiber* to) {
  Fiber* from = current();
  if (from == to) return;
  void** save = from ? &from->stack_pointer : &machine.stack_pointer;
  void* load = to ? to->stack_pointer : machine.stack_pointer;
#if defined(CUDASIM_ADDRESS)
  void** fake = from ? &from->fake_stack : &machine.fake_stack;
  __sanitizer_start_switch_fiber(from && from->done ? nullptr : fake,
                                 to ? to->stack : machine.stack, to ? kStack : machine.stack_bytes);
#endif
  self = to;
#if defined(CUDASIM_THREAD)
  __tsan_switch_to_fiber(to ? to->tsan : machine.tsan, kNoOrder);
#endif
  fastrnn_cudasim_switch(save, load);
#if defined(CUDASIM_ADDRESS)
  __sanitizer_finish_switch_fiber(current() ? current()->fake_stack : machine.fake_stack, nullptr,
                                  nullptr);
#endif
}

namespace {

void fiber_main() {
#if defined(CUDASIM_ADDRESS)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!machine.stack) machine.stack = stack, machine.stack_bytes = bytes;
#endif
#if defined(CUDASIM_THREAD)
  clocks.begin_thread();
#endif
  machine.kernel(machine.context);
  finish_thread();
  std::abort();
}

// Stacks with a page between them that may not be touched. The sanitizer does not see how they are
// made, because it would record a write to every byte.
class Stacks {
 public:
  char* at(size_t i) {
    const Quiet quiet;
    while (i >= stacks_.size()) {
      void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) std::perror("cudasim: no memory for stacks"), std::abort();
      mprotect(p, kPage, PROT_NONE);
      stacks_.push_back(static_cast<char*>(p) + kPage);
    }
    return stacks_[i];
  }
  void drop() {
    for (char* stack : stacks_) {
#if defined(CUDASIM_ADDRESS)
      __asan_unpoison_memory_region(stack, kStack);
#endif
      munmap(stack - kPage, kStack + kPage);
    }
    stacks_.clear();
  }

 private:
  std::vector<char*> stacks_;
};
Stacks stacks;

}  // namespace

void prepare_stack(Fiber& fiber, size_t place) {
  fiber.stack = stacks.at(place);
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // as if fiber_main had been called
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that the switch restores
  fiber.stack_pointer = top;
}

void drop_stacks() { stacks.drop(); }

}  // namespace sim
}  // namespace fastrnn
