// The location of a sweep's rows and which of them live at a step, for device code. All kernels
// share this; kernels/gpu/triton/common.py has the same functions for Triton.
//
// Row b of the batch lives while t < stop(b). `Before` means before in the recurrence's own
// direction. Steps and times are 32 bits wide (fastrnn_cuda_forward refuses more), offsets 64.
#pragma once

#include "cuda/contract.h"
#include "cuda/platform.cuh"

namespace fastrnn {

// One recurrence of a sweep.
struct Recurrence {
  const Sweep& sweep;
  int64_t p;
  bool reverse;

  __device__ __forceinline__ Recurrence(const Sweep& sweep, int64_t p)
      : sweep(sweep),
        p(p),
        // Not to be shifted out of the bits again at each step of a loop.
        reverse(platform::opaque(static_cast<uint32_t>(sweep.reverse >> p & 1)) != 0) {}

  // ---- Time -------------------------------------------------------------------------------------

  // The position in time of a step.
  __device__ __forceinline__ int time(int step) const {
    return reverse ? static_cast<int>(sweep.steps) - 1 - step : step;
  }

  // The number of steps of a row of the batch; 0 past the batch.
  __device__ __forceinline__ int stop(int64_t b) const {
    if (b >= sweep.batch) return 0;
    return static_cast<int>(sweep.length ? sweep.length[b] : sweep.steps);
  }

  // The steps [low, high) of the chunk at which any of some rows lives; `longest` is the most steps
  // of one of them. May be empty, with high < low.
  __device__ __forceinline__ int low(int longest) const {
    const int begin = static_cast<int>(sweep.begin);
    const int starts = static_cast<int>(sweep.steps) - longest;
    return reverse && starts > begin ? starts : begin;
  }
  __device__ __forceinline__ int high(int longest) const {
    const int end = static_cast<int>(sweep.end);
    return !reverse && longest < end ? longest : end;
  }

  // Whether an episode begins between the step before and this one, in a row that lives at t. Then
  // the step begins from zeros, and no gradient passes to the step before.
  __device__ __forceinline__ bool cut(int t, int64_t b, int stop) const {
    if (sweep.resets == nullptr) return false;
    const int edge = reverse ? t + 1 : t;
    return edge < stop && sweep.resets[row(edge, b)] != 0;
  }

  // Whether the step at t is the first of a row, which begins from the initial state.
  __device__ __forceinline__ bool initial(int t, int stop) const {
    return reverse ? t + 1 >= stop : t == 0;
  }

  // Whether a row begins at t or later in its direction, so that its state before the step at t is
  // the initial one. Also true if it has no steps.
  __device__ __forceinline__ bool unstarted(int t, int stop) const {
    return reverse ? t + 1 >= stop : t == 0 || stop == 0;
  }

  // Whether a row ends at t or before in its direction, so that the gradient of its state after the
  // step at t is that of the last one. Also true if it has no steps.
  __device__ __forceinline__ bool ended(int t, int stop) const {
    return reverse ? t == 0 || stop == 0 : t + 1 >= stop;
  }

  // The time of the step before, if there is one.
  __device__ __forceinline__ int time_before(int t) const { return reverse ? t + 1 : t - 1; }

  // ---- Places -----------------------------------------------------------------------------------

  // The row of `y` for row b of the batch, for t < stop(b).
  __device__ __forceinline__ int64_t row(int t, int64_t b) const {
    return (sweep.first ? sweep.first[t] : t * sweep.batch) + b;
  }

  // How many rows the step at a time lies behind that of an adjacent time, `from`.
  __device__ __forceinline__ int rows_between(int from, int to) const {
    const int64_t rows =
        sweep.first ? sweep.first[to] - sweep.first[from] : (to - from) * sweep.batch;
    return static_cast<int>(rows);
  }

  // The row of this recurrence in `u`, `du`, `dv` and `h_prev`, to be multiplied by their width.
  __device__ __forceinline__ int64_t chunk_row(int64_t row) const {
    return p * sweep.chunk_rows + row - (reverse ? sweep.base_reverse : sweep.base);
  }

  // The offset of [H] in `y` and `dy`.
  __device__ __forceinline__ int64_t output(int64_t row) const {
    return (row * sweep.recurrences + p) * sweep.hidden;
  }

  // The offset of value j of a row's `width` values of [H] in `tape`.
  __device__ __forceinline__ int64_t taped(int64_t row, int width, int j) const {
    return tape_origin(width) + output(row) * width + j * sweep.hidden;
  }

  // The offset in `tape` at which row 0 of the first recurrence would lie.
  __device__ __forceinline__ int64_t tape_origin(int width) const {
    const int64_t base = reverse ? sweep.tape_base_reverse : sweep.tape_base;
    return -base * sweep.recurrences * width * sweep.hidden;
  }

  // The offset of a row of the batch, [H], in each of `s0`, `last`, `dlast` and `ds0`.
  __device__ __forceinline__ int64_t own_state(int64_t b) const {
    return (p * sweep.batch + b) * sweep.hidden;
  }

  // The offset of state j of a row of the batch, [H], in `carry` and `ds`.
  __device__ __forceinline__ int64_t state(int j, int64_t b) const {
    return ((j * sweep.recurrences + p) * sweep.batch + b) * sweep.hidden;
  }

  // The offsets of a gate's weights [H, H] in `w_hh` and of its biases [H] in `b_hh`.
  __device__ __forceinline__ int64_t weights(int gates, int g) const {
    return (p * gates + g) * sweep.hidden * sweep.hidden;
  }
  __device__ __forceinline__ int64_t bias(int gates, int g) const {
    return (p * gates + g) * sweep.hidden;
  }
};

}  // namespace fastrnn
