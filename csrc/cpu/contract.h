// The contract between host and kernels: plain data, shapes, no ownership.
//
// T steps, B batch, I inputs, H hidden units, G gates, Gu of them with rows in w_ih and Gv with
// rows in w_hh, S states, K saved values, N learned parameters besides weights and biases, P
// recurrences (independent scans of the same input: directions, heads). A recurrence's *step*
// counts in its own direction; `t` is always the position in time.
//
// Q is the width of state 0, which is the output: H, unless it is projected. Then the cell gives
// m [H] instead, and state 0 is m * w_hr^T.
#pragma once

#include <cstdint>

#include "core/storage.h"

namespace fastrnn {

constexpr int kMaxGates = 16;
constexpr int kMaxStates = 8;
constexpr int kMaxParams = 32;

// The rows that exist at each time. Sequence i is the i-th longest sequence, so the live sequences
// of a step are always 0 .. live(t)-1. Three layouts:
//   dense    all null; row = t*B + b
//   packed   live_sequences, compact; row = compact[t] + sequence (torch's PackedSequence)
//   lengths  live_sequences, compact, order; row = t*B + order[sequence]
struct Rows {
  int64_t steps = 0;
  int64_t batch = 0;
  const int64_t* live_sequences = nullptr;  // [T], non-increasing
  const int64_t* compact = nullptr;         // [T+1], running sum of live_sequences
  const int64_t* order = nullptr;           // [B], sequence -> batch index
  const uint8_t* resets = nullptr;          // [rows], whether an episode begins here

  FASTRNN_INLINE int64_t live(int64_t t) const {
    return live_sequences ? live_sequences[t] : batch;
  }
  FASTRNN_INLINE int64_t batch_index(int64_t i) const { return order ? order[i] : i; }
  FASTRNN_INLINE bool packed() const { return compact && !order; }
  FASTRNN_INLINE int64_t row(int64_t t, int64_t i) const {
    return packed() ? compact[t] + i : t * batch + batch_index(i);
  }
  // Position among the live rows only.
  FASTRNN_INLINE int64_t compact_row(int64_t t, int64_t i) const {
    return (compact ? compact[t] : t * batch) + i;
  }
  FASTRNN_INLINE int64_t time(int64_t step, bool reverse) const {
    return reverse ? steps - 1 - step : step;
  }
  // Whether an episode begins between the recurrence's previous step and `step`. The initial state
  // counts as a step before the first row in time.
  FASTRNN_INLINE bool cut_before(int64_t step, int64_t i, bool reverse) const {
    if (!resets) return false;
    if (!reverse) return resets[row(step, i)];
    int64_t later = steps - step;
    return later < steps && i < live(later) && resets[row(later, i)];
  }
  // Whether an episode begins between `step` and the recurrence's next step.
  FASTRNN_INLINE bool cut_after(int64_t step, int64_t i, bool reverse) const {
    return resets && step + 1 < steps && i < live(time(step + 1, reverse)) &&
           cut_before(step + 1, i, reverse);
  }
  // Whether sequence i was live at the recurrence's previous step.
  FASTRNN_INLINE bool continues(int64_t step, int64_t i, bool reverse) const {
    return step > 0 && (!reverse || i < live(steps - step));
  }
};

// The sizes of a recurrence's weights.
struct RecurrenceSizes {
  int64_t inputs = 0;
  int64_t hidden = 0;
  int64_t recurrent = 0;   // Q
  bool projected = false;  // only for cells that are `projectable`
};

// What the random numbers of a call follow from.
struct Noise {
  uint64_t seed = 0;
  const int64_t* thresholds = nullptr;  // of each draw of the cell, its probability times 2^32
  const int64_t* sequences = nullptr;   // [B], the caller's index of sequence i, or null: its
                                        // batch index
};

// One scan. Weights are in the format, their rows padded with zeros to whole words; biases are in
// the compute type, states in the storage type.
struct Recurrence {
  bool reverse = false;
  const void* w_ih = nullptr;          // [Gu*H, I]
  const void* w_hh = nullptr;          // [Gv*H, Q]
  const void* b_ih = nullptr;          // [Gu*H] or null
  const void* b_hh = nullptr;          // [Gv*H] or null
  const void* w_hr = nullptr;          // [Q, H] if state 0 is projected
  const void* params = nullptr;        // [N, H] in the compute type, if the cell has parameters
  const float* scale_ih = nullptr;     // [Gu*H] if the format has scales: of the rows of w_ih,
  const float* scale_hh = nullptr;     // [Gv*H] of w_hh,
  const float* scale_hr = nullptr;     // [Q] and of w_hr
  const void* prepacked = nullptr;     // output of CompiledCell::pack; null: the call packs
  const void* s0[kMaxStates] = {};     // [B, Q] for state 0, [B, H] for others, or null for zeros
  const void* reset[kMaxStates] = {};  // the same of the states in which an episode begins
};

// Arguments of both sweeps. Row r of recurrence p begins at (r*P + p)*Q in `y` and at (r*P + p)*W*H
// in `tape`. The tape's W values of [H] each are states 1..S-1 after the step, the saved values,
// m if state 0 is projected, and what results of reductions fill.
struct Scan {
  Rows rows;
  int64_t inputs = 0;
  int64_t hidden = 0;
  int64_t recurrent = 0;   // Q
  bool projected = false;  // only for cells that are `projectable`
  int32_t recurrences = 0;
  Storage storage = Storage::kSame;
  const Recurrence* recurrence = nullptr;  // [P]
  const Noise* noise = nullptr;            // if the cell draws random numbers
  bool* late = nullptr;                    // set if a thread waited long for another, or null
};

struct ForwardArgs : Scan {
  const void* x = nullptr;  // element (t, b) at t*x_step + b*x_row, packed row r at r*x_row
  int64_t x_step = 0;
  int64_t x_row = 0;
  void* y = nullptr;                    // [rows, P, Q]
  void* tape = nullptr;                 // [rows, P, W, H] or null for inference
  void* const* final_states = nullptr;  // [P][S], each shaped like s0
};

// Values [H] of a row of the tape: `values` of the units, and what `results` of the row fill, which
// are stored in `computed` bytes each, where others take `stored`.
constexpr int64_t tape_values(int64_t values, int64_t results, int64_t computed, int64_t stored,
                              int64_t hidden) {
  const int64_t numbers = results * computed / stored;
  return values + (numbers > 0 ? (numbers + hidden - 1) / hidden : 0);
}

// Words of a row of gradients of `width` numbers in a format: of du, dv and dh.
constexpr int64_t gradient_row(Format format, int64_t width) {
  return format == Format::kBfloat16 ? (width + 15) / 16 * 8 : width;
}

// Numbers in a row of prepacked weights, enough for every vector width.
constexpr int64_t prepacked_width(int64_t width) { return (width + 15) / 16 * 16; }

// One chunk of steps [begin, end) of every recurrence, walked from its end. dy, dsteps, y and tape
// are in the storage type, weights and all else in the compute type, but for du, dv and dh, whose
// rows are gradient_row() words in the format. Outputs hold the chunk's live rows in time order.
struct BackwardArgs : Scan {
  int64_t begin = 0;
  int64_t end = 0;
  // Room for w_hh, and w_hr if state 0 is projected, in the kernel's layout, if the plan prepacks.
  // The layout depends on split_units; *prepacked_for is the split that they were packed for, or 0.
  void* prepacked = nullptr;
  int32_t* prepacked_for = nullptr;
  const void* dy = nullptr;      // [rows, P, Q] or null for zeros
  const void* dsteps = nullptr;  // [rows, P, S-1, H], of states past the first, or null for zeros
  const void* y = nullptr;       // [rows, P, Q]
  const void* tape = nullptr;    // [rows, P, W, H]
  void* const* ds = nullptr;     // [P][S], each shaped like s0: gradient carried in and out
  // [P][S], each shaped like s0: gradients of the states in which episodes begin, which are added
  // to, or null.
  void* const* dreset = nullptr;
  // [P], each [B, N*H]: gradients of the parameters, to which each step of a sequence adds, or
  // null.
  void* const* dp = nullptr;
  // [P] arrays each, with one row per live row:
  void* const* du = nullptr;        // [Gu*H]; equals dv if all gates are summed
  void* const* dv = nullptr;        // [Gv*H]
  void* const* h_prev = nullptr;    // [Q], state 0 before the step, if a gate multiplies it
  void* const* dh = nullptr;        // [Q], gradient of state 0 after it; null unless projected
  void* const* operands = nullptr;  // [J*H], of the products with other values than state 0
};

// Gradients of weights, biases and x from du and dv of a chunk. x and tape are in the storage type,
// du, dv and dh as in BackwardArgs, all else in the compute type. A null pointer means that its
// gradient is not wanted. The chunk that ends with the last step begins the gradients of weights
// and biases, the others add to them.
struct GradientArgs : Scan {
  int64_t depth = 0;            // Gu*H
  int64_t recurrent_depth = 0;  // Gv*H
  int64_t begin = 0;
  int64_t end = 0;
  // Room for [P][prepacked_width(I)][Gu*H] if dx is wanted and the plan prepacks; the chunk that
  // ends with the last step fills it.
  void* prepacked = nullptr;
  const void* x = nullptr;  // as in ForwardArgs
  int64_t x_step = 0;
  int64_t x_row = 0;
  const void* const* du = nullptr;  // as in BackwardArgs
  const void* const* dv = nullptr;
  const void* const* h_prev = nullptr;
  const void* const* dh = nullptr;
  const void* const* operands = nullptr;
  int64_t sites = 0;                // J
  const int8_t* site_of = nullptr;  // [Gv], the operand of each gate, or -1 for h_prev; if J > 0
  const void* tape = nullptr;       // [rows, P, tape_width, H]
  int64_t tape_width = 0;
  int64_t unprojected = 0;       // the value that is m
  void* const* dw_ih = nullptr;  // [P], each [Gu*H, I]
  void* const* dw_hr = nullptr;  // [P], each [recurrent, H]
  void* const* dw_hh = nullptr;  // [P], each [Gv*H, recurrent]
  void* const* db_ih = nullptr;  // [P], each [Gu*H]
  void* const* db_hh = nullptr;  // [P], each [Gv*H]
  void* dx = nullptr;            // [rows, I]; added to if there are several recurrences
  // The same for the reverse recurrences, or null if they add to dx. A chunk has other times of
  // these, so in one array the order of more than two terms would depend on the chunks.
  void* dx_reverse = nullptr;
};

// Size of BackwardArgs::prepacked, in numbers.
inline int64_t prepacked_for_backward(const BackwardArgs& a, int64_t recurrent_gates) {
  const int64_t hidden = prepacked_width(a.hidden), recurrent = prepacked_width(a.recurrent);
  return a.recurrences * recurrent * hidden * (recurrent_gates + a.projected);
}

// Rows of a stepper's states are padded to a multiple of this.
constexpr int64_t kPadding = 64;

// One layer of a stepper at one step: its cells or, after all of these, the projection of their
// output. States are in the compute type, their rows `stride` apart.
struct StepArgs {
  RecurrenceSizes sizes;
  int64_t batch = 0;
  const void* prepacked = nullptr;  // by CompiledCell::pack
  const void* x = nullptr;          // [B, I], rows x_row apart
  int64_t x_row = 0;
  Storage x_storage = Storage::kSame;
  void* room = nullptr;  // CompiledCell::step_room bytes, of this part alone
  int64_t stride = 0;
  const void* h = nullptr;   // [B, Q]
  void* next_h = nullptr;    // [B, Q], other memory than h
  void* s[kMaxStates] = {};  // [B, H] from state 1 on, changed in place
  void* m = nullptr;         // [B, H] if state 0 is projected
  void* y = nullptr;         // a copy of next_h, rows y_row apart, or null
  int64_t y_row = 0;
  Storage y_storage = Storage::kSame;
  int32_t part = 0;         // this part of the units, or of the columns of a projection
  int32_t parts = 1;        // number of parts
  bool descending = false;  // from the last panel, which the step before left in the cache
  bool project = false;     // run the projection instead of the cells
};

// How a call reads the weights.
enum class WeightLayout : int32_t {
  kUnpacked,   // in torch's layout, for few rows
  kPanels,     // packed panel by panel at each step, into memory that stays in the cache
  kPrepacked,  // packed before the first step
};

// The layout in which a format reads the weights of the forward and of the backward pass, if a plan
// asks for `asked`: only float and double have kernels for torch's.
constexpr bool is_plain(Format format) {
  return format == Format::kFloat || format == Format::kDouble;
}
constexpr WeightLayout forward_layout(Format format, WeightLayout asked) {
  return asked == WeightLayout::kUnpacked && !is_plain(format) ? WeightLayout::kPanels : asked;
}
constexpr WeightLayout backward_layout(Format format, WeightLayout asked) {
  return is_plain(format) ? asked : WeightLayout::kPrepacked;
}

// How the CPU kernel runs a problem; fastrnn/plan chooses it.
struct CpuPlan {
  WeightLayout weights = WeightLayout::kPrepacked;
  int32_t split_recurrences = 1;  // threads = recurrences x sequences x units
  int32_t split_sequences = 1;
  int32_t split_units = 1;
  int64_t chunk_rows = 1;  // of each thread in the forward pass, of all in the backward pass

  FASTRNN_INLINE int32_t threads() const {
    return split_recurrences * split_sequences * split_units;
  }
  CpuPlan on_one_thread() const {
    CpuPlan plan = *this;
    plan.split_recurrences = plan.split_sequences = plan.split_units = 1;
    return plan;
  }
};

// The facts of a cell that do not depend on code.
struct CellTraits {
  int32_t gates = 0;
  int32_t states = 0;
  int32_t saved = 0;
  int32_t params = 0;
  uint32_t summed = 0;         // a bit for each of the recurrent gates
  uint32_t shared_params = 0;  // bit n, if parameter n is one number for all units
  bool projectable = false;    // reads state 0 through v alone, so that it need not be H wide
  uint32_t gate_params = 0;    // bit n, if parameters n to n + G - 1 are one tensor [G*H]
  // Of a cell whose step has stages:
  int32_t stages = 1;
  int32_t rows = 0;                // results of reductions that a step saves
  int32_t sites = 0;               // J, products with other values than state 0
  int8_t site_of[kMaxGates] = {};  // which of these a recurrent gate is part of, or -1
  int32_t draws = 0;               // random numbers for each unit
  int32_t input_gates = 0;         // Gu, which have rows in w_ih
  int32_t recurrent_gates = 0;     // Gv, which have rows in w_hh
};

// A cell compiled for one instruction set. The index is a Format; all pointers of one that was not
// compiled are null. Kernels return false when memory runs out. Only kernels of the same cell,
// format and instruction set can read the output of `pack`.
struct CompiledCell : CellTraits {
  const char* name;
  bool (*forward[kFormats])(const ForwardArgs&, const CpuPlan&);
  bool (*backward[kFormats])(const BackwardArgs&, const CpuPlan&);
  int64_t (*prepacked_bytes[kFormats])(const RecurrenceSizes&);
  void (*pack[kFormats])(const RecurrenceSizes&, const Recurrence&, void* out);
  void (*step[kFormats])(const StepArgs&);
  int64_t (*step_room[kFormats])(const RecurrenceSizes&, int64_t batch);  // bytes of StepArgs::room
};

struct CompiledCells {
  const CompiledCell* cells;
  int32_t count;
  // The same for all cells; null in the library of a custom cell.
  bool (*gradients[kFormats])(const GradientArgs&, const CpuPlan&);
};

}  // namespace fastrnn
