// Memory that a thread will read or write soon, far from what it reads now.
#pragma once

#include <cstdint>

#include "core/vec.h"
#include "cpu/exported.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// A product leaves the memory idle, as its weights lie in the cache. So it asks for what comes
// after it, some lines before each block of its sums: asked for at once, they would fill the queues
// of the cache and stop the product.
class FASTRNN_EXPORTED Ahead {
 public:
  // `count` pieces of `bytes` each, `pitch` apart.
  void add(const void* first, int64_t bytes, int64_t pitch, int64_t count) {
    if (bytes <= 0 || count <= 0) return;
    spans_[size_++] = {static_cast<const char*>(first), bytes, pitch, count};
    lines_ += (bytes + kLine - 1) / kLine * count;
  }

  // All that was added is to be asked for by so many calls of ask().
  void spread(int64_t calls) { share_ = calls > 0 ? (lines_ + calls - 1) / calls : 0; }

  // Asks for the next share of lines.
  void ask() {
    for (int64_t left = share_; left > 0 && now_ < size_; --left) {
      Span& span = spans_[now_];
      __builtin_prefetch(span.at + done_);
      done_ += kLine;
      if (done_ < span.bytes) continue;
      done_ = 0;
      span.at += span.pitch;
      if (--span.count == 0) ++now_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kMost = 4;
  struct Span {
    const char* at;
    int64_t bytes, pitch, count;
  };

  Span spans_[kMost];
  int size_ = 0, now_ = 0;
  int64_t done_ = 0;  // bytes of the piece at hand
  int64_t lines_ = 0, share_ = 0;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
