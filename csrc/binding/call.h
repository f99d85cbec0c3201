// The values of one call of the operator: its inputs, outputs and gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/contract.h"
#include "cpu/registry.h"

namespace fastrnn {

using at::Tensor;
using at::TensorList;

// The most recurrences of a call: `reverse` has a bit for each.
constexpr int kMostRecurrences = 64;

// Which gradients a caller of scan_backward wants.
enum Need {
  kNeedX,
  kNeedWih,
  kNeedWhh,
  kNeedBias,
  kNeedWhr,
  kNeedParams,
  kNeedStates,
  kNeedResetStates,
  kNeeds
};
using Needs = std::array<bool, kNeeds>;

// The inputs of `scan` as its schema orders them; kernels/operands.py documents the shapes.
struct ScanInputs {
  std::string_view cell;
  const Tensor& x;
  TensorList w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states;
  const std::optional<Tensor>&batch_sizes, &lengths, &resets, &noise;
  int64_t reverse;

  // Those that may have gradients, besides x, in order.
  std::array<TensorList, 8> lists() const {
    return {w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states};
  }

  TensorList packed = {};          // the weights of each recurrence by pack(), or none
  Format format = Format::kFloat;  // of `packed`
};

inline void check_recurrences(const ScanInputs& in) {
  TORCH_CHECK(!in.w_hh.empty() && in.w_hh.size() <= kMostRecurrences, "scan: 1 to ",
              kMostRecurrences, " recurrences side by side, got ", in.w_hh.size());
}

using ScanOutputs = std::tuple<Tensor, std::vector<Tensor>, Tensor>;  // y, states, tape

// The states past the first after every step, [rows, P, S-1, H], from a tape.
inline Tensor steps_of(const ScanOutputs& out) {
  const auto& [y, states, tape] = out;
  return tape.narrow(2, 0, static_cast<int64_t>(states.size()) - 1).clone();
}

// The outputs as the one list that the schema returns, without an undefined tape, and with `steps`
// before it if that is defined: inductor's C++ wrapper supports no list beside other outputs.
inline std::vector<Tensor> as_list(ScanOutputs out, const Tensor& steps = {}) {
  auto& [y, states, tape] = out;
  std::vector<Tensor> list;
  list.reserve(states.size() + 3);
  list.push_back(std::move(y));
  for (Tensor& state : states) list.push_back(std::move(state));
  if (steps.defined()) list.push_back(steps);
  if (tape.defined()) list.push_back(std::move(tape));
  return list;
}

// Whether x is one step [B, I] of a cell: its states then have no dimension of recurrences.
inline bool one_step(const ScanInputs& in) { return in.x.dim() == 2 && !in.batch_sizes; }

// Optional lists of the schema: ahead-of-time compiled programs pass an empty list as none.
using OptionalList = std::optional<TensorList>;
inline TensorList or_empty(const OptionalList& list) { return list.value_or(TensorList()); }
inline OptionalList or_none(TensorList list) {
  return list.empty() ? OptionalList() : OptionalList(list);
}

// Gradients of the outputs; undefined stands for zeros.
struct OutputGrads {
  Tensor dy;
  std::vector<Tensor> dstates;  // S
  Tensor dsteps;                // of the states past the first after every step
};

// Gradients of the operator's inputs, in their order, only those that are needed: x, w_ih..,
// w_hh.., b_ih.., b_hh.., w_hr.., params.., s0.., reset_states..
struct Gradients {
  Tensor x;
  std::vector<Tensor> w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states;

  std::vector<Tensor> flat(const Needs& needs) const {
    std::vector<Tensor> all;
    if (needs[kNeedX]) all.push_back(x);
    for (const auto* group : {&w_ih, &w_hh, &b_ih, &b_hh, &w_hr, &params, &s0, &reset_states})
      all.insert(all.end(), group->begin(), group->end());
    return all;
  }
};

}  // namespace fastrnn
