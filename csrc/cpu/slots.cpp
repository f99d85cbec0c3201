#include "cpu/slots.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/memory.h"

namespace fastrnn {

void Slots::Free::operator()(char* memory) const { std::free(memory); }

Slots::Slots(const CompiledCell& cell, Format format, Storage storage, int64_t capacity,
             const std::vector<RecurrenceSizes>& layers, int32_t threads)
    : rows_(cell, format, storage, std::min(capacity, kRows), layers, threads),
      memory_(allocate(capacity * rows_.row_bytes())),
      taken_(capacity, false),
      free_(capacity) {
  if (!memory_) throw std::bad_alloc();
  std::memset(memory_.get(), 0, capacity * rows_.row_bytes());  // touches every page
  for (int64_t k = 0; k < capacity; ++k) free_[k] = capacity - 1 - k;
}

int64_t Slots::add() {
  if (free_.empty()) return -1;
  const int64_t slot = free_.back();
  free_.pop_back();
  taken_[slot] = true;
  reset(slot);
  return slot;
}

void Slots::remove(int64_t slot) {
  taken_[slot] = false;
  free_.push_back(slot);  // has had room for all slots from the beginning
}

void Slots::run(const int64_t* slots, int64_t n, int64_t steps, const Frames& x, const Frames& y) {
  const int64_t bytes = rows_.stored_bytes();
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t rows = std::min(kRows, n - first);
    for (int64_t i = 0; i < rows; ++i) rows_.write_row(i, states(slots[first + i]));
    const char* from = x.data + first * x.row * bytes;
    char* to = y.data + first * y.row * bytes;
    for (int64_t t = 0; t < steps; ++t)
      rows_.step(from + t * x.step * bytes, x.row, to + t * y.step * bytes, y.row, rows);
    for (int64_t i = 0; i < rows; ++i) rows_.read_row(i, states(slots[first + i]));
  }
}

void Slots::reset(int64_t slot) { std::memset(states(slot), 0, rows_.row_bytes()); }

void Slots::read(int64_t slot, int32_t s, void* to) const {
  const int64_t width = rows_.width(s) * rows_.computed_bytes(), S = rows_.states();
  const int64_t stride = rows_.stride_bytes();
  for (int64_t l = 0; l < rows_.layers(); ++l)
    std::memcpy(static_cast<char*>(to) + l * width, states(slot) + (l * S + s) * stride, width);
}

void Slots::write(int64_t slot, int32_t s, const void* from) {
  const int64_t width = rows_.width(s) * rows_.computed_bytes(), S = rows_.states();
  const int64_t stride = rows_.stride_bytes();
  for (int64_t l = 0; l < rows_.layers(); ++l)
    std::memcpy(states(slot) + (l * S + s) * stride, static_cast<const char*>(from) + l * width,
                width);
}

}  // namespace fastrnn
