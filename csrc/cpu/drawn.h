// The random numbers that a cell draws for the rows of a step.
#pragma once

#include <cstdint>

#include "core/cell.h"
#include "core/noise.h"
#include "cpu/contract.h"
#include "cpu/team.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// Memory of one thread, [sequences][draws][units], for its part of both.
template <class Cell, class T>
class Drawn {
  using V = Vec<T>;
  using Each = Draws<Cell>;

 public:
  static constexpr int D = Each::count;

  template <class Take>
  void place(int64_t sequences, int64_t units, const Take& take) {
    numbers_ = take(D > 0 ? sequences * D * units : 0);
  }

  // Draws what is drawn per sequence, before the first step of a sweep.
  void begin(const Scan& scan, int64_t p, Range sequences, Range units) const {
    if constexpr (Each::per_sequence != 0) draw_rows(scan, p, kEveryStep, sequences, units);
  }
  // Draws what is drawn per step, for the step at time t.
  void step(const Scan& scan, int64_t p, int64_t t, Range sequences, Range units) const {
    if constexpr (Each::per_sequence != (uint64_t{1} << D) - 1)
      draw_rows(scan, p, static_cast<uint32_t>(t), sequences, units);
  }

  // The numbers of a vector of units, of row `row` of those that were drawn.
  FASTRNN_INLINE void load(int64_t row, Range units, int64_t unit, V* to) const {
    const T* from = numbers_ + row * D * units.size() + unit - units.begin;
#pragma GCC unroll 64
    for (int d = 0; d < D; ++d) to[d] = fastrnn::load<V>(from + d * units.size());
  }

 private:
  void draw_rows(const Scan& scan, int64_t p, uint32_t step, Range sequences, Range units) const {
    const Noise& noise = *scan.noise;
    for (int64_t i = sequences.begin; i < sequences.end; ++i) {
      const int64_t sequence = noise.sequences ? noise.sequences[i] : scan.rows.batch_index(i);
      for (int d = 0; d < D; ++d) {
        if ((step == kEveryStep) != (Each::per_sequence >> d & 1)) continue;
        const int64_t threshold = noise.thresholds[d];
        const T value = Each::scaled >> d & 1 ? static_cast<T>(4294967296.0 / threshold) : T{1};
        draw(noise.seed, step, static_cast<uint32_t>(sequence), static_cast<uint32_t>(p << 16 | d),
             threshold, value, units.begin, units.end,
             numbers_ + ((i - sequences.begin) * D + d) * units.size());
      }
    }
  }

  T* numbers_ = nullptr;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
