// Threads that stay together for a whole sweep, and the memory they share.
//
// Peers that share units exchange numbers in each step, and so wait for each other without sleep.
// If one comes late, its core does other work, and the next step may be no better. So the team
// breaks up: the members leave the sweep, and one thread runs it again from the start.
#pragma once

#include <omp.h>
#include <sched.h>
#include <time.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

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

// What the members of a team have found out.
struct TeamState {
  bool late = false;    // a member came late
  bool broken = false;  // the members leave
  int32_t gone = 0;     // members that have left, or have ended
};

// Thrown by a member that leaves a broken team.
struct TeamIsBroken {};

// A thread's place in the team. Threads of one group sweep the same recurrence and the same
// sequences and share the units between them, so only they wait for each other within a step.
class Member {
 public:
  // `breakable` tells whether the sweep can be run again from the start.
  Member(Progress* progress, TeamState& team, const CpuPlan& plan, int32_t number, bool breakable)
      : index(number),
        unit(number % plan.split_units),
        sequence(number / plan.split_units % plan.split_sequences),
        recurrence(number / plan.split_units / plan.split_sequences),
        progress_(progress),
        team_(team),
        threads_(plan.threads()),
        peers_(plan.split_units),
        breakable_(breakable && plan.split_units > 1),
        begin_(plan.threads() > 1 ? nanoseconds() : 0) {}

  const int32_t index;                       // among all threads
  const int32_t unit, sequence, recurrence;  // this thread's part along each axis

  bool alone() const { return peers_ == 1; }
  void publish(int64_t value) {
    __atomic_store_n(&progress_[index].value, value, __ATOMIC_RELEASE);
  }
  void wait_for_peers(int64_t value) const { wait(index - unit, peers_, value); }
  void wait_for_all(int64_t value) const { wait(0, threads_, value); }
  bool broken() const { return __atomic_load_n(&team_.broken, __ATOMIC_RELAXED); }
  // Ends the member's part in the sweep. Of a broken team the first member sleeps until the others
  // have left: one of them may need its core to do so.
  void leave() {
    __atomic_fetch_add(&team_.gone, 1, __ATOMIC_RELAXED);
    while (index == 0 && broken() && __atomic_load_n(&team_.gone, __ATOMIC_RELAXED) < threads_) {
      const timespec nap{0, 50'000};
      nanosleep(&nap, nullptr);
    }
  }

 private:
  // A pause takes up to 140 cycles, as long as a peer's store takes to arrive: the first spins do
  // not pause. kSpins take 15 to 50 us: longer than most steps, far less than a time slice.
  static constexpr int32_t kEagerSpins = 64, kSpins = 1000;

  void wait(int32_t first, int32_t count, int64_t value) const {
    int64_t since = 0;
    for (int32_t other = first; other < first + count; ++other) {
      int32_t spins = 0;
      while (__atomic_load_n(&progress_[other].value, __ATOMIC_ACQUIRE) < value) {
        if (++spins < kEagerSpins) continue;
        cpu_relax();
        if (spins == kSpins) {
          wait_longer(value, since);
          spins = kEagerSpins;
        }
      }
    }
  }

  // Called every kSpins; `since` is when the first call of this wait was, 0 before it.
  __attribute__((noinline)) void wait_longer(int64_t value, int64_t& since) const {
    if (broken()) throw TeamIsBroken();
    const int64_t now = nanoseconds();
    if (since == 0) since = now;
    // Where the work between two exchanges takes long, so do the differences between threads.
    const int64_t between_exchanges = (since - begin_) / value;
    const int64_t patience = value == 1 ? kLateAtStart : kLate;
    if (now - since < patience + between_exchanges) return;
    __atomic_store_n(&team_.late, true, __ATOMIC_RELAXED);
    if (breakable_) {
      __atomic_store_n(&team_.broken, true, __ATOMIC_RELAXED);
      throw TeamIsBroken();
    }
    sched_yield();
  }

  Progress* progress_;
  TeamState& team_;
  int32_t threads_;
  int32_t peers_;
  bool breakable_;
  int64_t begin_;
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
  ~Arena() { sweep_memory().give_back(base_); }
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
    base_ = sweep_memory().borrow(used_ + kAlign);
    used_ = 0;
    return base_ != nullptr;
  }

 private:
  static constexpr size_t kAlign = 128;

  char* base_ = nullptr;
  size_t used_ = 0;
};

// Copies of what a sweep changes in place, to run it again.
template <class Sweep>
class Kept {
 public:
  // In both passes of the arena.
  void place(const Sweep& sweep, Arena& arena) {
    int64_t bytes = 0;
    sweep.each_changed([&](void*, int64_t n) { bytes += n; });
    memory_ = arena.take<char>(bytes);
  }
  void keep(const Sweep& sweep) const {
    char* to = memory_;
    sweep.each_changed([&](void* from, int64_t n) {
      memcpy(to, from, n);
      to += n;
    });
  }
  void restore(const Sweep& sweep) const {
    const char* from = memory_;
    sweep.each_changed([&](void* to, int64_t n) {
      memcpy(to, from, n);
      from += n;
    });
  }

 private:
  char* memory_ = nullptr;
};

enum class Ran { kYes, kNoMemory, kNoTeam };

// Runs a sweep once with the threads of the plan, see run_sweep.
template <class Sweep, class Args>
Ran run_with_team(const Args& args, const CpuPlan& plan) {
  const int32_t threads = plan.threads();
  const bool breakable = Sweep::kRepeatable && plan.split_units > 1;
  Sweep sweep(args, plan);
  Kept<Sweep> kept;
  Arena arena;
  Progress* progress = nullptr;
  const auto place = [&] {
    progress = arena.take<Progress>(threads);
    sweep.place(arena);
    if (breakable) kept.place(sweep, arena);
  };
  place();
  if (!arena.allocate()) return Ran::kNoMemory;
  place();
  for (int32_t i = 0; i < threads; ++i) progress[i].value = 0;
  if (breakable) kept.keep(sweep);
  TeamState team;
  const auto body = [&](int32_t index) {
    Member me(progress, team, plan, index, breakable);
    try {
      if (!me.broken()) sweep.thread(me);
    } catch (const TeamIsBroken&) {
    }
    if (breakable) me.leave();
  };
  if (!run_team(threads, body)) return Ran::kNoTeam;
  if (team.late && args.late) *args.late = true;
  if (!team.broken) return Ran::kYes;
  kept.restore(sweep);
  return Ran::kNoTeam;
}

// Runs a sweep: place(arena), called in both passes, takes its memory; then every thread runs
// thread(member). One thread runs it if the plan's number is not available, and again if the team
// breaks up, which only a sweep that is kRepeatable allows: each_changed visits what it changes in
// place. False when memory runs out.
template <class Sweep, class Args>
bool run_sweep(const Args& args, const CpuPlan& plan) {
  Ran ran = run_with_team<Sweep>(args, plan);
  if (ran == Ran::kNoTeam) ran = run_with_team<Sweep>(args, plan.on_one_thread());
  return ran == Ran::kYes;
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
