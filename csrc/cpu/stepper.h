// Streaming inference: a stack of layers with its prepacked weights and its states, one step at a
// time. step() allocates nothing, takes no lock and throws nothing.
//
// With several threads each has a part of every layer's units. The caller takes over what a helper
// has not begun by the time it is needed, so a helper without a core costs speed and not a
// deadline. Helpers spin between steps for a while, then sleep; the step that wakes them makes a
// system call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/contract.h"

namespace fastrnn {

class Stepper {
 public:
  // Layers from the input on; throws std::bad_alloc.
  Stepper(const CompiledCell& cell, bool in_double, Storage storage, int64_t batch,
          const std::vector<RecurrenceSizes>& layers, int32_t threads);
  ~Stepper();
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Takes a copy of the weights of a layer, which are in the compute type.
  void pack(int64_t layer, const Recurrence& weights);
  // x [B, I] to y [B, Q], both as stored, rows that far apart. They may overlap.
  void step(const void* x, int64_t x_row, void* y, int64_t y_row);
  // All states to zero.
  void reset();
  // States number `s` of all layers, [L, B, width] in the compute type.
  void read(int32_t s, void* to) const;
  void write(int32_t s, const void* from);

  int64_t layers() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t batch() const { return batch_; }
  int64_t inputs() const { return sizes_.front().inputs; }
  int64_t outputs() const { return sizes_.back().recurrent; }
  int64_t width(int32_t s) const { return s ? sizes_.back().hidden : outputs(); }
  int32_t states() const { return cell_.states; }
  int32_t threads() const { return threads_; }

 private:
  // A helper's part, one cache line each: the last phase that somebody began and that is done.
  struct alignas(64) Part {
    std::atomic<uint32_t> begun{0};
    std::atomic<uint32_t> done{0};
  };

  char* state(int64_t layer, int32_t s) const;
  void run(int32_t part);
  bool run_if_free(int32_t part, uint32_t phase);
  void run_phase();
  void help(int32_t part);

  const CompiledCell& cell_;
  void (*const kernel_)(const StepArgs&);
  const bool in_double_;
  const Storage storage_;
  const int64_t batch_, stride_;
  const std::vector<RecurrenceSizes> sizes_;
  const int32_t threads_;
  const int64_t number_;  // bytes of one, as computed
  const int64_t stored_;  // bytes of one, as stored

  struct Free {
    void operator()(char* memory) const;
  };
  std::unique_ptr<char, Free> memory_;
  std::vector<char*> weights_;  // [L]
  std::vector<char*> states_;   // [L][2 + states past the first]: h twice, [B][stride] each
  char* x_copy_ = nullptr;      // where x and y overlap
  std::vector<StepArgs> args_;  // [threads][L]

  const void* x_ = nullptr;
  void* y_ = nullptr;
  int64_t x_row_ = 0, y_row_ = 0;
  bool odd_ = false;  // which of its two places h is in, and which way weights are walked

  // A phase is the cells of a layer, or its projection. What it is may be read by whoever began a
  // part of it, as it lasts until all parts are done.
  int64_t layer_ = 0;
  bool project_ = false;
  std::unique_ptr<Part[]> parts_;
  std::vector<std::thread>* helpers_ = nullptr;
  std::atomic<uint32_t> phase_{0};  // counts; helpers wait for the next
  std::atomic<int32_t> asleep_{0};
  std::atomic<bool> stop_{false};
  int64_t forks_ = 0;
};

}  // namespace fastrnn
