// The state of the simulated machine, and the functions by which the files of this folder call each
// other. Kernels do not see it: cudasim.h is what they include.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cudasim.h"
#include "sanitizers.h"

// Hidden names are addressed directly, as names within one file are.
#pragma GCC visibility push(hidden)

namespace fastrnn {
namespace sim {

constexpr size_t kMaxShared = 232448;
constexpr unsigned kMaxThreads = 1024, kMaxCluster = 16, kBarriers = 16;
constexpr size_t kStack = 256 * 1024;
constexpr unsigned kStoreBytes = 16;  // width of a store into another block

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Fiber* next = nullptr;        // in a list of fibers that wait for the same event
  const char* waits = nullptr;  // the name of what the fiber waits for, and its address
  const void* waits_at = nullptr;
  bool done = false;
  const uint32_t* flag = nullptr;  // the flag that was polled last, and its value
  uint32_t flag_value = 0;
  uint64_t flag_releases = 0;
  bool arrived_in_cluster = false;
  unsigned cluster_phase = 0;
  std::vector<Copy> copies;       // those that have not landed, the oldest first
  std::vector<size_t> group_end;  // ends of committed groups: index into `copies`, plus `landed`
  size_t landed = 0;
#if defined(CUDASIM_THREAD)
  void* tsan = nullptr;
#endif
#if defined(CUDASIM_ADDRESS)
  void* fake_stack = nullptr;
#endif
};

struct List {
  Fiber* first = nullptr;
  Fiber* last = nullptr;
  void push(Fiber* fiber) {
    fiber->next = nullptr;
    (first ? last->next : first) = fiber;
    last = fiber;
  }
};

// A barrier that counts threads. Odd and even phases have tokens of their own: a thread that is
// late to leave does not see those that have arrived for the next phase.
struct Counter {
  unsigned arrived = 0, needed = 0, phase = 0;
  List waiting;
  char token[2];
};

// Lanes of one warp that wait for each other.
struct Meeting {
  unsigned mask = 0, arrived = 0, phase = 0;
  const char* name = nullptr;
  void* lanes[32];
  char token[2];
};

struct Warp {
  Fiber* lanes = nullptr;
  unsigned exist = 0;
  Meeting meetings[8];
};

struct MBarrier {
  MBarrier(uint64_t* b, unsigned arrivals) : place(b), count(arrivals), pending(arrivals) {}
  uint64_t* place;
  unsigned count, pending;
  int64_t bytes = 0;
  unsigned phase = 0;
  List waiting;
  char token = 0;
#if defined(CUDASIM_THREAD)
  void* agent = nullptr;  // a fiber in name only, which writes the stores that land
#endif
};

struct Cluster;

struct Block : BlockFacts {
  unsigned threads, live;
  Cluster* cluster;
  Counter barriers[kBarriers];
  std::vector<Warp> warps;
  std::vector<MBarrier> mbarriers;
};

struct Cluster {
  std::vector<Block*> blocks;
  Counter barrier;
  unsigned live = 0;
};

struct Store {
  Block* target;
  uint32_t offset, barrier_offset;
  unsigned char value[kStoreBytes];
  const Fiber* from;
};

class Random {
 public:
  void seed(uint64_t a, uint64_t b) {
    state_ = a * 0x9e3779b97f4a7c15 ^ (b + 1) * 0xbf58476d1ce4e5b9;
    for (int i = 0; i < 4; ++i) next();
  }
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>((next() >> 32) * n >> 32); }

 private:
  uint64_t state_ = 0;
};

struct Machine {
  void (*kernel)(void*) = nullptr;
  void* context = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;  // a ring, whose size is a power of two
  size_t ready_first = 0, ready_count = 0;
  size_t live = 0;                             // threads that have not ended
  List pollers;                                // have found the same value in a flag twice
  std::vector<std::unique_ptr<Store>> stores;  // have not landed yet
  Random random;
  // The schedule of this launch: threads run in turn if the seed is 0. Another seed draws how
  // random the order is.
  bool shuffled = false;
  unsigned choices = 1;  // the favoured one of this many ready threads runs
  uint64_t favour = 0;
  bool favours_warps = false;  // rather than blocks
  unsigned land_one_in = 1;    // a store lands at one in this many switches
  unsigned early_one_in = 2;   // one in this many copies lands at once; 0 for none
  uint64_t progress = 0, releases = 0;
  uint64_t progress_seen = 0;
  size_t idle_polls = 0, idle_rounds = 0;  // since the last progress
  void* stack_pointer = nullptr;
  bool failed = false;
  char end_token = 0;
#if defined(CUDASIM_THREAD)
  void* tsan = nullptr;
#endif
#if defined(CUDASIM_ADDRESS)
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
#endif
};

extern Machine machine;
extern uint64_t seed_given;

inline Fiber* current() { return static_cast<Fiber*>(self); }

inline unsigned linear(const Fiber& fiber) {
  return fiber.index.x + shape.block.x * (fiber.index.y + shape.block.y * fiber.index.z);
}

// ---- fibers.cpp --------------------------------------------------------------------------------

// Gives a fiber the stack number `place`, on which it starts at fiber_main.
void prepare_stack(Fiber& fiber, size_t place);
void drop_stacks();

// Runs another fiber, or the function that called `launch` where `to` is null.
void switch_to(Fiber* to);

// ---- schedule.cpp ------------------------------------------------------------------------------

// Draws from the seed how the threads of the next launch are scheduled.
void draw_schedule();

// Gives the processor to a thread that is ready. It returns when the current thread is chosen
// again.
void run_another();

// Waits until another thread makes the current one ready. The caller has put it on a list.
void sleep(const char* what, const void* where = nullptr);
void yield();

inline void make_ready(Fiber* fiber) {
  const size_t mask = machine.ready.size() - 1;
  machine.ready[(machine.ready_first + machine.ready_count++) & mask] = fiber;
}

inline void wake(List& list) {
  for (Fiber* fiber = list.first; fiber;) {
    Fiber* next = fiber->next;
    make_ready(fiber);
    fiber = next;
  }
  list = List{};
}

// Yields at random where a thread of a GPU would go on.
inline void maybe_yield() {
  if (machine.shuffled && machine.random.below(16) == 0) yield();
}

// ---- failures.cpp ------------------------------------------------------------------------------

std::string place_of(const Block* block);
[[noreturn]] void deadlock();

// ---- barriers.cpp ------------------------------------------------------------------------------

void end_phase(Counter& counter);

// ---- mbarriers.cpp -----------------------------------------------------------------------------

// Lets one of the stores into other blocks land; there is one.
void land_one();

// ---- cudasim.cpp -------------------------------------------------------------------------------

// Ends the current thread.
[[noreturn]] void finish_thread();

}  // namespace sim
}  // namespace fastrnn

#pragma GCC visibility pop
