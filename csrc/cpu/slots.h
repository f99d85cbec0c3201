// Streaming inference for servers: the states of many streams beside one copy of the weights. A
// stream has a slot, and a call runs the streams that have a frame now. It copies the states of
// these into the rows of a stepper, runs it, and copies the new states back; it allocates nothing,
// takes no lock and throws nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/contract.h"
#include "cpu/exported.h"
#include "cpu/stepper.h"

namespace fastrnn {

class FASTRNN_EXPORTED Slots {
 public:
  // Frames of rows and steps: element (i, t) of n rows of T steps begins at i*row + t*step.
  struct Frames {
    char* data = nullptr;
    int64_t row = 0;
    int64_t step = 0;
  };

  // Throws std::bad_alloc.
  Slots(const CompiledCell& cell, Format format, Storage storage, int64_t capacity,
        const std::vector<RecurrenceSizes>& layers, int32_t threads);

  void set_weights(int64_t layer, const void* prepacked) { rows_.set_weights(layer, prepacked); }
  // A free slot, whose states are zero from now on; -1 if there is none.
  int64_t add();
  void remove(int64_t slot);
  bool taken(int64_t slot) const { return slot >= 0 && slot < capacity() && taken_[slot]; }
  // Runs `steps` steps of the n streams of these slots, which are taken and distinct. x and y are
  // in the storage type and may overlap if they have the same address and strides.
  void run(const int64_t* slots, int64_t n, int64_t steps, const Frames& x, const Frames& y);
  // Sets the states of a slot to zero.
  void reset(int64_t slot);
  // State `s` of all layers of a slot, [L, width] in the compute type.
  void read(int64_t slot, int32_t s, void* to) const;
  void write(int64_t slot, int32_t s, const void* from);

  int64_t capacity() const { return static_cast<int64_t>(taken_.size()); }
  int64_t size() const { return capacity() - static_cast<int64_t>(free_.size()); }
  // What it shares with a stepper: sizes, threads, weights.
  const Stepper& stepper() const { return rows_; }

 private:
  // Rows that run at a time. Their states stay in the cache from layer to layer and from step to
  // step, and the weights are read once for all of them.
  static constexpr int64_t kRows = 128;

  char* states(int64_t slot) const { return memory_.get() + slot * rows_.row_bytes(); }

  Stepper rows_;
  struct Free {
    void operator()(char* memory) const;
  };
  std::unique_ptr<char, Free> memory_;  // [capacity][L][S] rows as in the stepper
  std::vector<bool> taken_;
  std::vector<int64_t> free_;  // a stack
};

}  // namespace fastrnn
