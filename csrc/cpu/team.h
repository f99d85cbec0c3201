// Threads that stay together for a whole sweep, and the memory they share.
#pragma once

#include <omp.h>
#include <sched.h>

#include <cstdint>
#include <cstdlib>

#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/memory.h"
#include "cpu/spin.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts` nearly equal parts of [0, n).
FASTRNN_INLINE Range part_of(int64_t n, int64_t parts, int64_t index) {
  return {n * index / parts, n * (index + 1) / parts};
}

// Part `index` of the sequences, such that all parts have about the same number of live rows at
// times [begin, end).
inline Range sequences_of(const Rows& rows, int64_t begin, int64_t end, int64_t parts,
                          int64_t index) {
  if (parts == 1) return {0, rows.batch};
  if (!rows.live_sequences) return part_of(rows.batch, parts, index);
  int64_t total = 0;
  for (int64_t t = begin; t < end; ++t) total += rows.live(t);
  int64_t last = end;  // steps of sequence i: live sequences do not increase with t
  int64_t sum = 0;
  Range out{rows.batch, rows.batch};
  if (index == 0) out.begin = 0;
  for (int64_t i = 0; i < rows.batch; ++i) {
    while (last > begin && rows.live(last - 1) <= i) --last;
    sum += last - begin;
    if (out.begin == rows.batch && sum * parts > total * index) out.begin = i;
    if (index + 1 < parts && sum * parts > total * (index + 1)) {
      out.end = i;
      break;
    }
  }
  if (out.end < out.begin) out.end = out.begin;
  return out;
}

// How far a thread has come, on a cache line of its own.
struct alignas(64) Progress {
  int64_t value = 0;
};

// A thread's place in the team. Threads of one group sweep the same recurrence and the same
// sequences and share the units between them, so only they wait for each other within a step.
class Member {
 public:
  Member(Progress* progress, const CpuPlan& plan, int32_t number)
      : index(number),
        unit(number % plan.split_units),
        sequence(number / plan.split_units % plan.split_sequences),
        recurrence(number / plan.split_units / plan.split_sequences),
        progress_(progress),
        threads_(plan.threads()),
        peers_(plan.split_units) {}

  const int32_t index;                       // among all threads
  const int32_t unit, sequence, recurrence;  // this thread's part along each axis

  bool alone() const { return peers_ == 1; }
  void publish(int64_t value) {
    __atomic_store_n(&progress_[index].value, value, __ATOMIC_RELEASE);
  }
  void wait_for_peers(int64_t value) const { wait(index - unit, peers_, value); }
  void wait_for_all(int64_t value) const { wait(0, threads_, value); }

 private:
  // A pause takes up to 140 cycles, as long as a peer's store takes to arrive: the first spins do
  // not pause. kSpins take 15 to 50 us: longer than most steps, far less than a time slice.
  static constexpr int32_t kEagerSpins = 64, kSpins = 1000;

  void wait(int32_t first, int32_t count, int64_t value) const {
    for (int32_t other = first; other < first + count; ++other) {
      int32_t spins = 0;
      while (__atomic_load_n(&progress_[other].value, __ATOMIC_ACQUIRE) < value) {
        if (++spins < kEagerSpins) continue;
        cpu_relax();
        if (spins == kSpins) {
          sched_yield();
          spins = 0;
        }
      }
    }
  }

  Progress* progress_;
  int32_t threads_;
  int32_t peers_;
};

// Runs body(index) on `threads` threads at once. Returns false and runs nothing if fewer are
// available (nested parallelism, limits), because members that wait for each other must all exist.
template <class Body>
bool run_team(int32_t threads, const Body& body) {
  if (threads == 1) {
    FlushDenormals flush;
    body(0);
    return true;
  }
  bool complete = false;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      FlushDenormals flush;
      int32_t index = omp_get_thread_num();
      body(index);
      if (index == 0) complete = true;
    }
  }
  return complete;
}

// Memory for one sweep, laid out in two passes: the first counts, the second hands out.
class Arena {
 public:
  Arena() = default;
  ~Arena() { cached().give_back(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(at);
  }
  bool ready() const { return base_ != nullptr; }
  // Ends the counting pass; false when memory runs out.
  bool allocate() {
    base_ = cached().borrow(used_ + kAlign);
    used_ = 0;
    return base_ != nullptr;
  }

 private:
  static constexpr size_t kAlign = 128;
  static CachedMemory& cached() {
    thread_local CachedMemory memory;
    return memory;
  }

  char* base_ = nullptr;
  size_t used_ = 0;
};

// Runs a sweep: place(arena), called in both passes, takes its memory; then every thread runs
// thread(member). Uses one thread if the plan's number is not available; false when memory runs
// out.
template <class Sweep, class Args>
bool run_sweep(const Args& args, const CpuPlan& plan) {
  Sweep sweep(args, plan);
  Arena arena;
  arena.take<Progress>(plan.threads());
  sweep.place(arena);
  if (!arena.allocate()) return false;
  Progress* progress = arena.take<Progress>(plan.threads());
  sweep.place(arena);
  for (int32_t i = 0; i < plan.threads(); ++i) progress[i].value = 0;
  const auto body = [&](int32_t index) {
    Member me(progress, plan, index);
    sweep.thread(me);
  };
  if (run_team(plan.threads(), body)) return true;
  CpuPlan serial = plan;
  serial.split_recurrences = serial.split_sequences = serial.split_units = 1;
  return run_sweep<Sweep>(args, serial);
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
