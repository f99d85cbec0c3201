// Streaming inference: a stack of layers with its prepacked weights and its states, one step at a
// time. step() allocates nothing, takes no lock and throws nothing.
//
// With several threads, each has a part of every layer's units. The caller takes over the parts
// that no helper has begun when its own is done, so a helper without a core costs speed, not a
// deadline. A helper that loses its core in the middle of a part does cost one; then the caller
// runs all parts itself for a while (contention.h). Helpers spin between steps for a while, then
// sleep; the step that wakes them makes a system call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/contract.h"
#include "cpu/exported.h"

namespace fastrnn {

class FASTRNN_EXPORTED Stepper {
 public:
  // `layers` begins at the input; throws std::bad_alloc.
  Stepper(const CompiledCell& cell, Format format, Storage storage, int64_t batch,
          const std::vector<RecurrenceSizes>& layers, int32_t threads);
  ~Stepper();
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Copies the weights of a layer, which CompiledCell::pack packed.
  void set_weights(int64_t layer, const void* prepacked);
  // x [B, I] to y [B, Q], both in the storage type, with rows x_row and y_row numbers apart. They
  // may overlap.
  void step(const void* x, int64_t x_row, void* y, int64_t y_row) {
    step(x, x_row, y, y_row, batch_);
  }
  // The same for the first `rows` of the batch alone, at least one.
  void step(const void* x, int64_t x_row, void* y, int64_t y_row, int64_t rows);
  // Sets all states to zero.
  void reset();
  // State `s` of all layers, [L, B, width] in the compute type.
  void read(int32_t s, void* to) const;
  void write(int32_t s, const void* from);
  // All states of one row of the batch, row_bytes() with their padding.
  void read_row(int64_t row, char* to) const;
  void write_row(int64_t row, const char* from);
  int64_t row_bytes() const { return layers() * cell_.states * stride_bytes(); }
  // Of a row of one state.
  int64_t stride_bytes() const { return stride_ * computed_bytes_; }

  int64_t layers() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t batch() const { return batch_; }
  int64_t inputs() const { return sizes_.front().inputs; }
  int64_t outputs() const { return sizes_.back().recurrent; }
  int64_t width(int32_t s) const { return s ? sizes_.back().hidden : outputs(); }
  int32_t states() const { return cell_.states; }
  int32_t threads() const { return threads_; }
  Format format() const { return format_; }
  // Bytes of a number in the compute type and in the storage type.
  int64_t computed_bytes() const { return computed_bytes_; }
  int64_t stored_bytes() const { return stored_bytes_; }
  // Bytes of the copies of all weights.
  int64_t weight_bytes() const;

 private:
  // A thread's part, on its own cache line: the last phase in which it was begun, and was done.
  struct alignas(64) Part {
    std::atomic<uint32_t> begun{0};
    std::atomic<uint32_t> done{0};
  };

  char* state(int64_t layer, int32_t s) const;
  void run(int32_t part);
  bool run_if_free(int32_t part, uint32_t phase);
  void run_phase();
  void wait_for(int32_t part, uint32_t phase);
  void help(int32_t part);

  const CompiledCell& cell_;
  void (*const kernel_)(const StepArgs&);
  const Format format_;
  const Storage storage_;
  const int64_t batch_, stride_;
  const std::vector<RecurrenceSizes> sizes_;
  const int32_t threads_;
  const int64_t computed_bytes_;  // of a number in the compute type
  const int64_t stored_bytes_;    // of a number in the storage type

  struct Free {
    void operator()(char* memory) const;
  };
  std::unique_ptr<char, Free> memory_;
  std::vector<char*> weights_;  // [L]
  std::vector<char*> states_;   // [L][2 + states past the first]: h twice, [B][stride] each
  char* x_copy_ = nullptr;      // used if x and y overlap
  std::vector<StepArgs> args_;  // [threads][L]

  const void* x_ = nullptr;
  void* y_ = nullptr;
  int64_t x_row_ = 0, y_row_ = 0, rows_ = 0;
  bool alone_ = true;  // whether the caller runs all parts of this step
  bool late_ = false;  // whether a helper came late in this step
  bool odd_ = false;   // whether h is in its second buffer; weights are then read from their end

  // A phase is the cells of a layer, or its projection. These two change only when all parts are
  // done, so a thread that began a part may read them.
  int64_t layer_ = 0;
  bool project_ = false;
  std::unique_ptr<Part[]> parts_;
  std::vector<std::thread>* helpers_ = nullptr;
  std::atomic<uint32_t> phase_{0};  // number of the phase; helpers wait for the next
  std::atomic<int32_t> asleep_{0};
  std::atomic<bool> stop_{false};
  int64_t forks_ = 0;
};

}  // namespace fastrnn
