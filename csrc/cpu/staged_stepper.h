// One layer of a stepper at one time step, for cells whose step has stages.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cell.h"
#include "core/math.h"
#include "cpu/contract.h"
#include "cpu/formats.h"
#include "cpu/staged.h"
#include "cpu/staged_weights.h"

namespace fastrnn {
inline namespace FASTRNN_ISA {

// The layer of a stepper at one time step. Its first part runs all units.
template <class Cell, class F>
class StagedStepper {
  using T = typename F::Number;
  using V = Vec<T>;
  using Weights = StagedWeights<Cell, F>;
  using Step = StagedStep<Cell, F>;
  static constexpr int Gu = kInputGates<Cell>, S = Cell::kStates;
  static constexpr int kLanes = lanes<V>();

 public:
  // Bytes of StepArgs::room.
  static int64_t room(const RecurrenceSizes& n, int64_t batch) {
    int64_t total = 0;
    Buffers().place(n, batch, [&](int64_t count) {
      total += count;
      return static_cast<T*>(nullptr);
    });
    return total * static_cast<int64_t>(sizeof(T));
  }

  static void run(const StepArgs& args) {
    if (args.part > 0 || args.project) return;  // the projection follows the cells
    FlushDenormals flush;
    const RecurrenceSizes& n = args.sizes;
    const Step step(n, Weights::at(n, args.prepacked), OwnUnits<T>(n.hidden, 1, 0));
    const int64_t padded = Weights::padded(n);
    Buffers room;
    T* next = static_cast<T*>(args.room);
    room.place(n, args.batch, [&](int64_t count) { return std::exchange(next, next + count); });
    const int64_t width = row_words<F>(n.inputs);
    for (int64_t b = 0; b < args.batch; ++b)
      put_row<F>(room.x + b * width, n.inputs, room.x_scales + b,
                 [&](int64_t k, int live) __attribute__((always_inline)) {
                   return load_as<V>(args.x, b * args.x_row + k, live, args.x_storage);
                 });
    step.project({room.x, width, room.x_scales}, args.batch, room.u);
    room.rows.u = room.u;
    for (int s = 0; s < S; ++s) {
      room.rows.state[s] = static_cast<const T*>(s ? args.s[s] : args.h);
      room.rows.state_stride[s] = args.stride;
    }
    step.run(room.rows, args.batch, [](int64_t) { return NoStoredRow{}; }, [] {});
    T* const h = static_cast<T*>(args.next_h);
    const bool projected = Cell::kProjectable && n.projected;
    if (projected)
      step.project_output(room.rows, args.batch, {0, Projection<F>::vectors(n)}, h, args.stride);
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int s = projected; s < S; ++s)
        for (int64_t unit = 0; unit < padded; unit += kLanes)
          store((s ? static_cast<T*>(args.s[s]) : h) + b * args.stride + unit,
                load<V>(room.rows.next + (b * S + s) * padded + unit));
      for (int64_t at = 0; at < n.recurrent && args.y; at += kLanes)
        store_as(args.y, b * args.y_row + at, load<V>(h + b * args.stride + at),
                 within<V>(at, n.recurrent), args.y_storage);
    }
  }

 private:
  struct Buffers {
    typename F::Word* x;
    T *x_scales, *u;
    typename Step::Rows rows;

    template <class Take>
    void place(const RecurrenceSizes& n, int64_t batch, const Take& take) {
      x = take(batch * row_words<F>(n.inputs));
      x_scales = take(F::kScaled ? batch : 0);
      u = take(batch * Gu * Weights::padded(n));
      rows.place_shared(batch, n, take);
      rows.place_own(batch, n, take);
    }
  };
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
