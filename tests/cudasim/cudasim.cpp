// The scheduler and the state of the simulated machine; see cudasim.h. It is compiled without
// -fsanitize, but with -DCUDASIM_ADDRESS or -DCUDASIM_THREAD if the kernels are compiled with it.
#include "cudasim.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(CUDASIM_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- Reports to the sanitizers -----------------------------------------------------------------

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

namespace fastrnn {
namespace sim {
namespace {

// `release` copies a thread's clock into a token, `acquire` copies the token's into a thread. Every
// token is an address of its own.
#if defined(CUDASIM_THREAD)
void release(void* token) { __tsan_release(token); }
void acquire(void* token) { __tsan_acquire(token); }

// Hides the simulator's own accesses; the sanitizer still sees malloc and memmove.
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
constexpr unsigned kNoOrder = 1;  // switching fibers orders nothing

// The sanitizer needs a millisecond to create its state of a thread, so the state is used again: in
// another launch, or in another block of a launch with very many.
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
  // Everything before the launch happens before the current thread.
  void begin_thread() { acquire(&start_token_); }

 private:
  std::vector<void*> clocks_;
  size_t used_ = 0;
  char start_token_ = 0;
};
Clocks clocks;
#else
void release(void*) {}
void acquire(void*) {}
class Quiet {
 public:
  Quiet() {}
};
#endif

// ---- State -------------------------------------------------------------------------------------

constexpr size_t kMaxShared = 232448;
constexpr unsigned kMaxThreads = 1024, kMaxCluster = 16, kBarriers = 16;
constexpr size_t kStack = 256 * 1024, kPage = 4096;
constexpr unsigned kStoreBytes = 16;  // of a store into another block

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Fiber* next = nullptr;  // in a list of fibers that wait for the same
  const char* waits = nullptr;
  const void* waits_at = nullptr;
  bool done = false;
  const uint32_t* flag = nullptr;  // the flag polled last, and the value found
  uint32_t flag_value = 0;
  uint64_t flag_releases = 0;
  bool arrived_in_cluster = false;
  unsigned cluster_phase = 0;
  std::vector<Copy> copies;       // copies that have not landed, the oldest first
  std::vector<size_t> group_end;  // of committed groups: index into `copies`, plus `landed`
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

// A barrier that counts threads. Odd and even phases have tokens of their own: a thread that leaves
// late does not see the arrivals for the next phase.
struct Counter {
  unsigned arrived = 0, needed = 0, phase = 0;
  List waiting;
  char token[2];
};

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

// The 64 bits in shared memory hold kBarrierTag and an index into Block::mbarriers.
constexpr uint64_t kBarrierTag = 0x6d62617272000000, kBarrierTagMask = ~uint64_t{0xffffff};
struct MBarrier {
  MBarrier(uint64_t* b, unsigned arrivals) : place(b), count(arrivals), pending(arrivals) {}
  uint64_t* place;
  unsigned count, pending;
  int64_t bytes = 0;
  unsigned phase = 0;
  List waiting;
  char token = 0;
#if defined(CUDASIM_THREAD)
  void* agent = nullptr;  // a fiber that never runs: the writer of the stores that land
#endif
};

struct Cluster;

}  // namespace

struct Block : BlockFacts {
  unsigned threads, live;
  Cluster* cluster;
  Counter barriers[kBarriers];
  std::vector<Warp> warps;
  std::vector<MBarrier> mbarriers;
};

namespace {

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
  std::vector<Fiber*> ready;  // a ring of a power of two
  size_t ready_first = 0, ready_count = 0;
  size_t live = 0;                             // threads that have not ended
  List pollers;                                // they found the same value in a flag twice
  std::vector<std::unique_ptr<Store>> stores;  // they have not landed
  Random random;
  // The schedule of this launch: in turn for seed 0, random for others, each in its own way.
  bool shuffled = false;
  unsigned choices = 1;  // the favoured one of so many ready threads runs
  uint64_t favour = 0;
  bool favours_warps = false;  // otherwise blocks
  unsigned land_one_in = 1;    // one in so many switches lands a store
  unsigned early_one_in = 2;   // one in so many copies lands at once
  uint64_t progress = 0, releases = 0;
  uint64_t progress_seen = 0;
  size_t idle_polls = 0, idle_rounds = 0;  // since the progress seen
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

Machine machine;
std::mutex one_launch;
std::string failure;
uint64_t seed_given = [] {
  const char* text = std::getenv("FASTRNN_CUDASIM_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0;
}();
uint64_t launches = 0;

Fiber* current() { return static_cast<Fiber*>(self); }

// ---- Fibers ------------------------------------------------------------------------------------

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

// Switches to the launch itself if `to` is null.
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

void make_ready(Fiber* fiber) {
  const size_t mask = machine.ready.size() - 1;
  machine.ready[(machine.ready_first + machine.ready_count++) & mask] = fiber;
}

void wake(List& list) {
  for (Fiber* fiber = list.first; fiber;) {
    Fiber* next = fiber->next;
    make_ready(fiber);
    fiber = next;
  }
  list = List{};
}

void land_one();
[[noreturn]] void deadlock();

unsigned linear(const Fiber& fiber) {
  return fiber.index.x + shape.block.x * (fiber.index.y + shape.block.y * fiber.index.z);
}

uint64_t favour_of(const Fiber* fiber) {
  const uint3 block = fiber->block->index;
  uint64_t id = block.x + (uint64_t{block.y} << 20) + (uint64_t{block.z} << 40);
  if (machine.favours_warps) id = id * 64 + linear(*fiber) / 32;
  return (id ^ machine.favour) * 0x9e3779b97f4a7c15 >> 16;
}

Fiber* take_ready() {
  const size_t mask = machine.ready.size() - 1;
  Fiber*& first = machine.ready[machine.ready_first & mask];
  if (machine.shuffled) {
    if (machine.random.below(256) == 0) machine.favour = machine.random.next();
    size_t best = machine.random.below(machine.ready_count);
    for (unsigned i = 1; i < machine.choices; ++i) {
      const size_t other = machine.random.below(machine.ready_count);
      if (favour_of(machine.ready[(machine.ready_first + other) & mask]) >
          favour_of(machine.ready[(machine.ready_first + best) & mask])) {
        best = other;
      }
    }
    std::swap(first, machine.ready[(machine.ready_first + best) & mask]);
  }
  ++machine.ready_first;
  --machine.ready_count;
  return first;
}

void notice_progress() {
  if (machine.progress == machine.progress_seen) return;
  machine.progress_seen = machine.progress;
  machine.idle_polls = machine.idle_rounds = 0;
}

// Switches to a ready thread; returns when the current thread is chosen again.
void run_another() {
  if (!machine.stores.empty() && machine.random.below(machine.land_one_in) == 0) land_one();
  while (machine.ready_count == 0) {
    if (!machine.stores.empty()) {
      land_one();
      continue;
    }
    // The flags of polling threads may have changed: wake them, unless that brought no progress.
    notice_progress();
    if (!machine.pollers.first || ++machine.idle_rounds > 3) deadlock();
    wake(machine.pollers);
  }
  switch_to(take_ready());
}

// Waits until another thread makes the current one ready. The caller has put it on a list.
void sleep(const char* what, const void* where = nullptr) {
  current()->waits = what;
  current()->waits_at = where;
  run_another();
  current()->waits = nullptr;
}

void yield() {
  make_ready(current());
  run_another();
}

// Yields at random, at a point at which a thread of a GPU could go on.
void maybe_yield() {
  if (machine.shuffled && machine.random.below(16) == 0) yield();
}

void finish_thread();

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

void prepare_stack(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // as if fiber_main had been called
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Stacks, each followed by a page that must not be accessed. Under the thread sanitizer every batch
// of blocks gets new ones; otherwise it would confuse the variables of two threads. They are made
// quietly, or it would record a write to every byte.
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
    for (char* stack : stacks_) munmap(stack - kPage, kStack + kPage);
    stacks_.clear();
  }

 private:
  std::vector<char*> stacks_;
};
Stacks stacks;

// ---- Failures ----------------------------------------------------------------------------------

std::string place(const Block* block) {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", block->index.x, block->index.y,
                block->index.z);
  return text;
}

[[noreturn]] void deadlock() {
  std::string text = "deadlock: no thread can go on";
  int lines = 0;
  const Fiber* end = machine.fibers.data() + machine.fibers.size();
  for (const Fiber* fiber = machine.fibers.data(); fiber < end;) {
    const Fiber* last = fiber;
    while (last + 1 < end && last[1].block == fiber->block && last[1].done == fiber->done &&
           last[1].waits == fiber->waits && last[1].waits_at == fiber->waits_at) {
      ++last;
    }
    if (!fiber->done && ++lines <= 24) {
      char line[256];
      std::snprintf(line, sizeof line, "\n  %s threads %u-%u: %s", place(fiber->block).c_str(),
                    linear(*fiber), linear(*last), fiber->waits ? fiber->waits : "running");
      text += line;
      if (fiber->waits_at) {
        const auto* at = static_cast<const unsigned char*>(fiber->waits_at);
        const size_t offset = static_cast<size_t>(at - fiber->block->shared);
        if (offset < shape.shared_bytes) {
          std::snprintf(line, sizeof line, " at byte %zu of shared memory", offset);
        } else {
          std::snprintf(line, sizeof line, " at %p", fiber->waits_at);
        }
        text += line;
      }
    }
    fiber = last + 1;
  }
  fail("%s", text.c_str());
}

}  // namespace

void fail(const char* format, ...) {
  const Quiet quiet;
  char text[8192];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failure = text;
  if (const Fiber* fiber = current()) {
    failure += "\n  (found by " + place(fiber->block) + " thread " +
               std::to_string(linear(*fiber)) + ", seed " + std::to_string(seed_given) + ")";
  }
  std::fprintf(stderr, "cudasim: %s\n", failure.c_str());
  machine.failed = true;
  if (!self) std::abort();
  switch_to(nullptr);  // and never back
  std::abort();
}

Thread* self = nullptr;
Shape shape{};
int planted = 0;
const BlockFacts& facts() { return *self->block; }

// ---- Barriers ----------------------------------------------------------------------------------

namespace {

void end_phase(Counter& counter) {
  counter.arrived = 0;
  ++counter.phase;
  ++machine.progress;
  wake(counter.waiting);
}

void count_in(Counter& counter, unsigned needed, const char* name) {
  ++machine.progress;
  if (counter.arrived && counter.needed != needed) {
    fail("%s for %u threads, where others wait for %u", name, needed, counter.needed);
  }
  counter.needed = needed;
  char* token = &counter.token[counter.phase % 2];
  release(token);
  if (++counter.arrived == needed) {
    end_phase(counter);
    maybe_yield();
  } else {
    counter.waiting.push(current());
    sleep(name, nullptr);
  }
  acquire(token);
}

void finish_thread() {
  Fiber* fiber = current();
  Block& block = *fiber->block;
  Cluster& cluster = *block.cluster;
  {
    const Quiet quiet;
    for (const Copy& copy : fiber->copies) {
      std::memcpy(copy.shared, copy.global ? copy.global : "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16);
    }
  }
  ++machine.progress;
  // A thread that has ended counts as arrived at __syncthreads and at the cluster's barrier.
  Counter& barrier = block.barriers[0];
  --block.live;
  if (barrier.arrived) {
    barrier.needed = block.live;
    if (barrier.arrived == barrier.needed) end_phase(barrier);
  }
  if (fiber->arrived_in_cluster) {
    fail("a thread ends between cluster_arrive and cluster_wait");
  }
  --cluster.live;
  if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.live) {
    end_phase(cluster.barrier);
  }
  if (block.live == 0) {
    for (const auto& s : machine.stores) {
      if (s->target == &block) {
        fail("%s ends while %s still stores into its shared memory, at byte %u",
             place(&block).c_str(), place(s->from->block).c_str(), s->offset);
      }
    }
    for (const MBarrier& b : block.mbarriers) {
      if (b.bytes != 0) {
        fail("%s ends while its barrier at byte %zu of shared memory still expects %lld bytes",
             place(&block).c_str(),
             static_cast<size_t>(reinterpret_cast<unsigned char*>(b.place) - block.shared),
             static_cast<long long>(b.bytes));
      }
    }
  }
  release(&machine.end_token);
  fiber->done = true;
  if (--machine.live == 0) switch_to(nullptr);
  run_another();
}

}  // namespace

void block_barrier() { count_in(self->block->barriers[0], self->block->live, "__syncthreads"); }

void named_barrier(unsigned id, unsigned threads) {
  if (id >= kBarriers) fail("named_barrier %u: there are 16", id);
  if (threads % 32 != 0 || threads == 0 || threads > self->block->threads) {
    fail("named_barrier %u for %u threads of a block of %u", id, threads, self->block->threads);
  }
  static const char* const names[kBarriers] = {
      "named_barrier 0",  "named_barrier 1",  "named_barrier 2",  "named_barrier 3",
      "named_barrier 4",  "named_barrier 5",  "named_barrier 6",  "named_barrier 7",
      "named_barrier 8",  "named_barrier 9",  "named_barrier 10", "named_barrier 11",
      "named_barrier 12", "named_barrier 13", "named_barrier 14", "named_barrier 15"};
  count_in(self->block->barriers[id], threads, names[id]);
}

void cluster_arrive() {
  Fiber* fiber = current();
  Cluster& cluster = *fiber->block->cluster;
  if (fiber->arrived_in_cluster) fail("cluster_arrive twice without cluster_wait");
  fiber->arrived_in_cluster = true;
  fiber->cluster_phase = cluster.barrier.phase;
  release(&cluster.barrier.token[cluster.barrier.phase % 2]);
  ++machine.progress;
  if (++cluster.barrier.arrived == cluster.live) end_phase(cluster.barrier);
  maybe_yield();
}

void cluster_wait() {
  Fiber* fiber = current();
  Counter& barrier = fiber->block->cluster->barrier;
  if (!fiber->arrived_in_cluster) fail("cluster_wait without cluster_arrive");
  if (barrier.phase == fiber->cluster_phase) {
    barrier.waiting.push(fiber);
    sleep("cluster_wait");
  }
  acquire(&barrier.token[fiber->cluster_phase % 2]);
  fiber->arrived_in_cluster = false;
}

void meet(const char* name, unsigned mask, void* mine, void (*combine)(void** lanes), bool orders) {
  Fiber* fiber = current();
  Warp& warp = fiber->block->warps[linear(*fiber) / 32];
  mask &= warp.exist;
  const unsigned bit = 1u << fiber->lane;
  if (!(mask & bit)) fail("%s: the mask %08x lacks lane %u itself", name, mask, fiber->lane);
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.arrived && m.mask == mask && !(m.arrived & bit)) meeting = &m;
  }
  for (Meeting& m : warp.meetings) {
    if (!meeting && !m.arrived) meeting = &m;
  }
  if (!meeting) fail("%s: more than 8 groups of lanes wait in one warp", name);
  if (!meeting->arrived) {
    meeting->mask = mask;
    meeting->name = name;
    for (void*& lane : meeting->lanes) lane = nullptr;
  } else if (std::strcmp(meeting->name, name) != 0) {
    fail("lane %u is at %s, others of its warp are at %s", fiber->lane, name, meeting->name);
  }
  char* token = &meeting->token[meeting->phase % 2];
  if (orders) release(token);
  meeting->lanes[fiber->lane] = mine;
  meeting->arrived |= bit;
  ++machine.progress;
  if (meeting->arrived == mask) {
    if (combine) combine(meeting->lanes);
    meeting->arrived = 0;
    ++meeting->phase;
    for (unsigned rest = mask & ~bit; rest; rest &= rest - 1) {
      make_ready(warp.lanes + __builtin_ctz(rest));
    }
    if (orders) maybe_yield();
  } else {
    sleep(name);
  }
  if (orders) acquire(token);
}

namespace {

struct Shuffled {
  unsigned char value[16], result[16];
  unsigned source;
};

struct Vote {
  bool predicate;
  unsigned result;
};

}  // namespace

void shuffle_bytes(const char* name, unsigned mask, void* value, size_t bytes, unsigned source) {
  Shuffled mine;
  mine.source = source;
  auto* data = static_cast<volatile unsigned char*>(value);
  for (size_t i = 0; i < bytes; ++i) mine.value[i] = data[i];
  meet(
      name, mask, &mine,
      [](void** lanes) {
        for (int i = 0; i < 32; ++i) {
          if (!lanes[i]) continue;
          auto* to = static_cast<Shuffled*>(lanes[i]);
          const auto* from = static_cast<const Shuffled*>(lanes[to->source % 32]);
          // The value of a lane that does not take part is undefined.
          for (int j = 0; j < 16; ++j) to->result[j] = from ? from->value[j] : 0xff;
        }
      },
      false);
  for (size_t i = 0; i < bytes; ++i) data[i] = mine.result[i];
}

unsigned ballot(unsigned mask, bool predicate) {
  Vote mine{predicate, 0};
  meet(
      "__ballot_sync", mask, &mine,
      [](void** lanes) {
        unsigned result = 0;
        for (int i = 0; i < 32; ++i) {
          if (lanes[i] && static_cast<const Vote*>(lanes[i])->predicate) result |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (lanes[i]) static_cast<Vote*>(lanes[i])->result = result;
        }
      },
      false);
  return mine.result;
}

// ---- Flags -------------------------------------------------------------------------------------

void polled(const uint32_t* flag, uint32_t value) {
  Fiber* fiber = current();
  if (fiber->flag == flag && fiber->flag_value == value &&
      fiber->flag_releases == machine.releases) {
    machine.pollers.push(fiber);
    sleep("load_acquire", flag);
    return;
  }
  if (fiber->flag != flag || fiber->flag_value != value) fiber->flag = flag;
  fiber->flag_value = value;
  fiber->flag_releases = machine.releases;
  notice_progress();
  if (++machine.idle_polls > 100000 + 1000 * machine.fibers.size()) {
    fiber->waits = "load_acquire";
    fiber->waits_at = flag;
    deadlock();
  }
  yield();
}

void released() {
  ++machine.releases;
  ++machine.progress;
  wake(machine.pollers);
  maybe_yield();
}

// ---- Matrix products ---------------------------------------------------------------------------

namespace {

struct Operands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float widen(Product product, uint16_t bits) {
  if (product == Product::kBfloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      values[i] = __half2float(__half(raw));
    }
    return values;
  }();
  return table[bits];
}

// d[16][8] += a[16][k] b[k][8], k after k in float.
template <int k_size, class Element>
void multiply(void** lanes, Element element) {
  float a[16][k_size], b[k_size][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    constexpr int per = k_size / 8;  // numbers in a register
    for (int i = 0; i < per; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[g + 8 * (r % 2)][per * q + i + per * 4 * (r / 2)] = element(mine.a[r], i);
      }
      for (int r = 0; r < 2; ++r) b[per * q + i + per * 4 * r][g] = element(mine.b[r], i);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * q + i % 2] = mine.d[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < k_size; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) mine.d[i] = d[g + 8 * (i / 2)][2 * q + i % 2];
  }
}

template <Product product>
void multiply16(void** lanes) {
  multiply<16>(lanes, [](uint32_t bits, int i) {
    return widen(product, static_cast<uint16_t>(bits >> (16 * i)));
  });
}

void multiply_tf32(void** lanes) {
  // TF32 ignores the last 13 bits.
  multiply<8>(lanes, [](uint32_t bits, int) { return from_bits(bits & ~uint32_t{0x1fff}); });
}

struct Rows {
  uint32_t* r;
  Vector16 row;
};

}  // namespace

void mma(Product product, float* d, const uint32_t* a, const uint32_t* b) {
  Operands operands{d, a, b};
  if (product == Product::kTf32) {
    meet("mma_tf32", ~0u, &operands, multiply_tf32, false);
  } else if (product == Product::kBfloat16) {
    meet("mma of bfloat16", ~0u, &operands, multiply16<Product::kBfloat16>, false);
  } else {
    meet("mma of float16", ~0u, &operands, multiply16<Product::kFloat16>, false);
  }
}

void exchange_rows(uint32_t* r, Vector16 row, bool transposed) {
  Rows rows{r, row};
  const auto plain = [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const auto& from = *static_cast<const Rows*>(lanes[8 * m + lane / 4]);
        static_cast<Rows*>(lanes[lane])->r[m] = from.row[lane % 4];
      }
    }
  };
  const auto columns = [](void** lanes) {
    const auto element = [&](int row, int column) {
      const uint32_t word = static_cast<const Rows*>(lanes[row])->row[column / 2];
      return word >> (16 * (column % 2)) & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int row = 8 * m + 2 * (lane % 4), column = lane / 4;
        static_cast<Rows*>(lanes[lane])->r[m] = element(row, column) | element(row + 1, column)
                                                                           << 16;
      }
    }
  };
  // The other lanes' reads happen before this lane's later writes to these rows.
  if (transposed) {
    meet("ldmatrix4_transposed", ~0u, &rows, columns, true);
  } else {
    meet("ldmatrix4", ~0u, &rows, plain, true);
  }
}

// ---- Memory ------------------------------------------------------------------------------------

void check_aligned(const char* what, const void* p, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail("%s: address %p is not aligned to %zu bytes", what, p, alignment);
  }
}

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  check_aligned(what, p, alignment);
  const auto* at = static_cast<const unsigned char*>(p);
  const size_t offset = static_cast<size_t>(at - self->block->shared);
  if (at < self->block->shared || offset + bytes > shape.shared_bytes) {
    fail("%s: address %p is not in the block's %zu bytes of shared memory", what, p,
         shape.shared_bytes);
  }
}

bool copy_begins(void* shared, const void* global, bool valid) {
  if (machine.early_one_in && machine.random.below(machine.early_one_in) == 0) return true;
  const Quiet quiet;
  current()->copies.push_back({shared, valid ? global : nullptr});
  return false;
}

void copy_async_commit() {
  const Quiet quiet;
  Fiber* fiber = current();
  fiber->group_end.push_back(fiber->landed + fiber->copies.size());
}

bool next_copy(int groups_left, Copy* copy) {
  const Quiet quiet;
  Fiber* fiber = current();
  const size_t groups = fiber->group_end.size(), left = static_cast<size_t>(groups_left);
  if (groups <= left) return false;
  if (fiber->landed == fiber->group_end[groups - left - 1]) {
    fiber->group_end.erase(fiber->group_end.begin(),
                           fiber->group_end.begin() + static_cast<ptrdiff_t>(groups - left));
    return false;
  }
  *copy = fiber->copies.front();
  fiber->copies.erase(fiber->copies.begin());
  ++fiber->landed;
  return true;
}

// ---- mbarriers and stores that land later ------------------------------------------------------

namespace {

MBarrier& find_barrier(Block& block, const void* place, uint64_t value) {
  const size_t index = value & ~kBarrierTagMask;
  if ((value & kBarrierTagMask) != kBarrierTag || index >= block.mbarriers.size() ||
      block.mbarriers[index].place != place) {
    fail("no mbarrier has been initialised at byte %zu of the shared memory of %s",
         static_cast<size_t>(static_cast<const unsigned char*>(place) - block.shared),
         sim::place(&block).c_str());
  }
  return block.mbarriers[index];
}

void end_phase_if_complete(MBarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  ++b.phase;
  wake(b.waiting);
}

constexpr int64_t kMaxBytes = (1 << 20) - 1;

void count_bytes(MBarrier& b, int64_t bytes) {
  b.bytes += bytes;
  if (b.bytes > kMaxBytes || b.bytes < -kMaxBytes) {
    fail("an mbarrier expects %lld bytes, more than it can count", static_cast<long long>(b.bytes));
  }
}

void land_one() {
  const Quiet quiet;
  std::swap(machine.stores[machine.random.below(machine.stores.size())], machine.stores.back());
  const std::unique_ptr<Store> s = std::move(machine.stores.back());
  machine.stores.pop_back();
  ++machine.progress;
  Block& target = *s->target;
  auto* place = reinterpret_cast<uint64_t*>(target.shared + s->barrier_offset);
  MBarrier& b = find_barrier(target, place, *place);
  unsigned char* data = target.shared + s->offset;
#if defined(CUDASIM_THREAD)
  const Fiber* fiber = current();
  __tsan_switch_to_fiber(b.agent, kNoOrder);
  acquire(s.get());
  __tsan_write_range(data, kStoreBytes);
  release(&b.token);
  __tsan_switch_to_fiber(fiber ? fiber->tsan : machine.tsan, kNoOrder);
#endif
  for (unsigned i = 0; i < kStoreBytes; ++i) data[i] = s->value[i];
  count_bytes(b, -int64_t{kStoreBytes});
  end_phase_if_complete(b);
}

}  // namespace

uint64_t new_barrier(uint64_t* b, unsigned count) {
  const Quiet quiet;
  if (count == 0 || count > kMaxBytes) fail("barrier_init for %u arrivals", count);
  auto& all = self->block->mbarriers;
  if (all.size() == all.capacity()) fail("more than %zu mbarriers in a block", all.capacity());
  all.emplace_back(b, count);
#if defined(CUDASIM_THREAD)
  all.back().agent = clocks.take();
#endif
  return kBarrierTag | (all.size() - 1);
}

void barrier_arrive(uint64_t* place, uint64_t value, unsigned bytes) {
  MBarrier& b = find_barrier(*self->block, place, value);
  ++machine.progress;
  release(&b.token);
  count_bytes(b, bytes);
  --b.pending;  // it was at least 1: a phase ends at 0, unless bytes are due
  if (b.pending > b.count) fail("more arrivals at an mbarrier than the %u it counts", b.count);
  end_phase_if_complete(b);
  maybe_yield();
}

bool barrier_passed(uint64_t* place, uint64_t value, unsigned parity) {
  MBarrier& b = find_barrier(*self->block, place, value);
  if (parity > 1) fail("barrier_wait for parity %u", parity);
  if (b.phase % 2 == parity) {
    b.waiting.push(current());
    sleep(parity ? "barrier_wait, parity 1" : "barrier_wait, parity 0", place);
    return false;
  }
  acquire(&b.token);
  return true;
}

namespace {

// A tag of 4 bits that no plain offset has, then the rank, then an offset, to which code may add.
constexpr uint32_t kPeerTag = 0xa0000000, kOffsetBits = 20;

}  // namespace

uint32_t peer_address(const void* shared, unsigned rank) {
  check_shared("peer_address", shared, 1, 1);
  if (rank >= self->block->cluster->blocks.size()) {
    fail("peer_address: rank %u in a cluster of %zu", rank, self->block->cluster->blocks.size());
  }
  const auto* at = static_cast<const unsigned char*>(shared);
  return kPeerTag | rank << kOffsetBits | static_cast<uint32_t>(at - self->block->shared);
}

void st_async16(uint32_t peer_data, const void* value, uint32_t peer_barrier) {
  constexpr uint32_t offset_mask = (1u << kOffsetBits) - 1;
  const auto& blocks = self->block->cluster->blocks;
  const uint32_t rank = (peer_data & ~kPeerTag) >> kOffsetBits;
  const uint32_t offset = peer_data & offset_mask, barrier_offset = peer_barrier & offset_mask;
  if ((peer_data & 0xf0000000) != kPeerTag || rank >= blocks.size() ||
      offset + kStoreBytes > shape.shared_bytes || offset % kStoreBytes != 0) {
    fail("st_async16: %08x is no aligned address in a block of the cluster", peer_data);
  }
  if (peer_data >> kOffsetBits != peer_barrier >> kOffsetBits || barrier_offset % 8 != 0 ||
      barrier_offset + 8 > shape.shared_bytes) {
    fail("st_async16: %08x is no barrier in the block of %08x", peer_barrier, peer_data);
  }
  Block* target = blocks[rank];
  if (target->live == 0) {
    fail("st_async16 into the shared memory of %s, which has ended", place(target).c_str());
  }
#if defined(CUDASIM_THREAD)
  // From now on no thread may use the target's bytes, and the barrier must be initialised.
  __tsan_write_range(target->shared + offset, kStoreBytes);
  __tsan_read_range(target->shared + barrier_offset, 8);
#endif
  {
    const Quiet quiet;
    auto s = std::make_unique<Store>();
    s->target = target;
    s->offset = offset;
    s->barrier_offset = barrier_offset;
    s->from = current();
    std::memcpy(s->value, value, kStoreBytes);
    release(s.get());
    machine.stores.push_back(std::move(s));
  }
  ++machine.progress;
  maybe_yield();
}

// ---- Launches ----------------------------------------------------------------------------------

namespace {

// Blocks that run at the same time for certain: a cluster, or the grid of a cooperative launch.
void run_together(unsigned first, unsigned count) {
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  std::vector<Block> blocks(count);
  std::vector<Cluster> clusters(count / shape.cluster);
  machine.fibers = std::vector<Fiber>(static_cast<size_t>(count) * threads);
#if defined(CUDASIM_THREAD)
  clocks.begin_batch(machine.fibers.size());
#endif
  machine.live = machine.fibers.size();
  size_t ring = 1;
  while (ring < machine.fibers.size()) ring *= 2;
  machine.ready.assign(ring, nullptr);
  machine.ready_first = machine.ready_count = 0;
  machine.pollers = List{};
  for (unsigned i = 0; i < count; ++i) {
    Block& block = blocks[i];
    const unsigned id = first + i;
    block.index = {id % shape.grid.x, id / shape.grid.x % shape.grid.y,
                   id / shape.grid.x / shape.grid.y};
    block.rank = id % shape.cluster;
    void* shared = nullptr;
    if (posix_memalign(&shared, 1024, shape.shared_bytes ? shape.shared_bytes : 1)) std::abort();
    std::memset(shared, 0xff, shape.shared_bytes);
    block.shared = static_cast<unsigned char*>(shared);
    block.threads = block.live = threads;
    block.cluster = &clusters[i / shape.cluster];
    block.cluster->blocks.push_back(&block);
    block.cluster->live += threads;
    block.warps.resize((threads + 31) / 32);
    block.mbarriers.reserve(64);
    for (unsigned j = 0; j < threads; ++j) {
      Fiber& fiber = machine.fibers[static_cast<size_t>(i) * threads + j];
      fiber.index = {j % shape.block.x, j / shape.block.x % shape.block.y,
                     j / shape.block.x / shape.block.y};
      fiber.lane = j % 32;
      fiber.block = &block;
      fiber.stack = stacks.at(static_cast<size_t>(i) * threads + j);
      prepare_stack(fiber);
      Warp& warp = block.warps[j / 32];
      if (j % 32 == 0) warp.lanes = &fiber;
      warp.exist |= 1u << (j % 32);
#if defined(CUDASIM_THREAD)
      fiber.tsan = clocks.take();
#endif
      make_ready(&fiber);
    }
  }
  self = nullptr;
  run_another();
  self = nullptr;
#if defined(CUDASIM_THREAD)
  stacks.drop();
#endif
  machine.stores.clear();
  machine.fibers.clear();
  for (const Block& block : blocks) std::free(block.shared);
  if (machine.failed) {
#if defined(CUDASIM_ADDRESS)
    for (size_t i = 0; i < static_cast<size_t>(count) * threads; ++i) {
      __asan_unpoison_memory_region(stacks.at(i), kStack);
    }
#endif
    stacks.drop();
  }
}

}  // namespace

int launch(const Shape& wanted, void (*kernel)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const dim3 grid = wanted.grid, block = wanted.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMaxThreads || block.z > 64 || wanted.cluster == 0 ||
      wanted.cluster > kMaxCluster || grid.x % wanted.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (wanted.shared_bytes > kMaxShared) return cudaErrorInvalidValue;
  shape = wanted;
  machine.kernel = kernel;
  machine.context = context;
  machine.failed = false;
  ++machine.progress;
  machine.random.seed(seed_given, launches++);
  machine.shuffled = seed_given != 0;
  static constexpr unsigned choices[] = {1, 4, 16, 64};
  machine.choices = machine.shuffled ? choices[machine.random.below(4)] : 1;
  machine.favour = machine.random.next();
  machine.favours_warps = machine.random.below(2) != 0;
  static constexpr unsigned odds[] = {1, 8, 128, 100000};
  machine.land_one_in = machine.shuffled ? odds[machine.random.below(4)] : 64;
  static constexpr unsigned early[] = {0, 1, 2, 4};  // 0: none
  machine.early_one_in = machine.shuffled ? early[machine.random.below(4)] : 0;
#if defined(CUDASIM_THREAD)
  machine.tsan = __tsan_get_current_fiber();
  clocks.begin_launch();
#endif
#if defined(CUDASIM_ADDRESS)
  machine.stack = nullptr;
#endif
  const auto batch = static_cast<unsigned>(wanted.cooperative ? blocks : wanted.cluster);
  const auto batches = static_cast<unsigned>(blocks / batch);
  std::vector<unsigned> order(batches);
  for (unsigned i = 0; i < batches; ++i) order[i] = i;
  for (unsigned i = batches; machine.shuffled && i > 1; --i) {
    std::swap(order[i - 1], order[machine.random.below(i)]);
  }
  for (unsigned i = 0; i < batches && !machine.failed; ++i) {
    run_together(order[i] * batch, batch);
  }
  acquire(&machine.end_token);
  return machine.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int clear(void* p, size_t bytes) {
  std::memset(p, 0, bytes);
  return cudaSuccess;
}

int copy(void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

int resident_clusters(int blocks, size_t shared_bytes) {
  if (blocks < 1 || blocks > static_cast<int>(kMaxCluster)) return -cudaErrorInvalidValue;
  return shared_bytes > kMaxShared ? 0 : 128 / blocks;
}

const char* error_text(int error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorLaunchFailure:
      return failure.c_str();
    default:
      return "an error that the simulator does not know";
  }
}

}  // namespace sim
}  // namespace fastrnn

// Sets the order in which the threads of the following launches run: 0 is in turn.
extern "C" void fastrnn_cudasim_seed(uint64_t seed) {
  fastrnn::sim::seed_given = seed;
  fastrnn::sim::launches = 0;
}

// Sets the planted mistake that the following launches make; 0 for none.
extern "C" void fastrnn_cudasim_plant(int fault) { fastrnn::sim::planted = fault; }
