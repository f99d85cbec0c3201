// Whether other work takes the cores away from threads that wait for each other.
//
// Threads that exchange numbers in each step of a sweep gain only while all of them run. A thread
// whose core serves another process for a time slice stops all the others, step after step. Nothing
// announces this, but a peer that comes late shows it. Then no threads exchange numbers for a
// while.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/exported.h"
#include "cpu/spin.h"

namespace fastrnn {

// The state of the whole process. Times are those of `nanoseconds` (spin.h).
//
// It lasts for kShortest after a peer came late, then one sweep tries again. If that meets a late
// peer too, it lasts kGrowth times as long, at most kLongest. It is forgotten after threads have
// exchanged numbers undisturbed for as long as it lasted, or after kForgotten without a try.
class FASTRNN_EXPORTED Contention {
 public:
  static constexpr int64_t kShortest = 5'000'000, kLongest = 2'000'000'000, kGrowth = 4;
  static constexpr int64_t kForgotten = 60'000'000'000;

  // Whether a peer came late a short time ago. Reads no clock if that is forgotten.
  bool lasts() const { return remembered() && lasts(nanoseconds()); }
  bool remembered() const {
    return __builtin_expect(until_.load(std::memory_order_relaxed) != 0, false);
  }
  bool lasts(int64_t now) const { return now < until_.load(std::memory_order_relaxed); }
  // A peer came late.
  void late(int64_t now);
  // Threads exchanged numbers for some time, and none was late.
  void undisturbed(int64_t time);
  // Forgets all late peers.
  void end() { until_ = 0; }

 private:
  std::atomic<int64_t> until_{0};  // 0 if it is forgotten
  std::atomic<int64_t> length_{kShortest};
  std::atomic<int64_t> undisturbed_{0};  // time since the last peer came late
};

// That of this process.
FASTRNN_EXPORTED Contention& contention();

}  // namespace fastrnn
