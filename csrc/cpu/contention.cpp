#include "cpu/contention.h"

#include <algorithm>

namespace fastrnn {

void Contention::late(int64_t now) {
  int64_t until = until_.load(std::memory_order_relaxed);
  if (now < until) return;
  const bool again = until != 0 && now - until < kForgotten;
  const int64_t length = again ? std::min(kGrowth * length_.load(), kLongest) : kShortest;
  // Of several threads that find out at once, one sets the length.
  if (!until_.compare_exchange_strong(until, now + length)) return;
  length_ = length;
  undisturbed_ = 0;
}

void Contention::undisturbed(int64_t time) {
  int64_t until = until_.load();
  if (undisturbed_.fetch_add(time) + time >= length_) until_.compare_exchange_strong(until, 0);
}

Contention& contention() {
  static Contention state;
  return state;
}

}  // namespace fastrnn
