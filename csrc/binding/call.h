// What the files of the operator share: inputs, planning, and the way back into Python.
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

// Which gradients a caller of scan_backward wants.
enum Need { kNeedX, kNeedWih, kNeedWhh, kNeedBias, kNeedWhr, kNeedStates, kNeeds };
using Needs = std::array<bool, kNeeds>;

// The inputs of `scan` as its schema orders them; fastrnn/reference.py documents the shapes.
struct ScanInputs {
  std::string_view cell;
  const Tensor& x;
  TensorList w_ih, w_hh, b_ih, b_hh, w_hr, s0;
  const std::optional<Tensor>&batch_sizes, &lengths, &resets;
  int64_t reverse;
  TensorList packed = {};  // the weights of each scan by pack(), or none
};

using ScanOutputs = std::tuple<Tensor, std::vector<Tensor>, Tensor>;  // y, states, tape

// These as the one list that the schema returns, without a tape that is undefined: inductor's C++
// wrapper takes no list beside other results.
inline std::vector<Tensor> as_list(ScanOutputs out) {
  auto& [y, states, tape] = out;
  std::vector<Tensor> list;
  list.reserve(states.size() + 2);
  list.push_back(std::move(y));
  for (Tensor& each : states) list.push_back(std::move(each));
  if (tape.defined()) list.push_back(std::move(tape));
  return list;
}

// Whether x is one step [B, I] of a cell: its states then have no dimension of scans.
inline bool one_step(const ScanInputs& in) { return in.x.dim() == 2 && !in.batch_sizes; }

// Lists as the schema has them: ahead-of-time compiled programs pass an empty list as none.
using OptionalList = std::optional<TensorList>;
inline TensorList or_empty(const OptionalList& list) { return list.value_or(TensorList()); }
inline OptionalList or_none(TensorList list) {
  return list.empty() ? OptionalList() : OptionalList(list);
}

// Gradients that arrive; undefined stands for zeros.
struct Incoming {
  Tensor dy;
  std::vector<Tensor> dstates;  // S
};

// Numbers that decide a plan; fastrnn/plan's Problem, and the threads there are.
struct Problem {
  std::string_view cell;
  int64_t steps, batch, rows, inputs, hidden, lanes;
  at::ScalarType dtype;
  at::DeviceType device;
  bool tape, backward, projected, frozen;
};

struct Choice {
  std::string kernel;
  CpuPlan cpu;
};

// The plan for a problem, remembered per thread; asks fastrnn/plan the first time.
const Choice& choose(const CellFacts& cell, const Problem& problem);
// Forgets all plans, in every thread.
void forget_plans();

// The op through the dispatcher.
ScanOutputs call_scan(const ScanInputs& in, bool tape, bool recompute = false);

// Implementations that live in Python (fastrnn/kernels.py), by name of the kernel.
ScanOutputs python_forward(const std::string& kernel, const ScanInputs& in, bool tape);
std::vector<Tensor> python_backward(const std::string& kernel, const ScanInputs& in,
                                    const Incoming& grads, const Tensor& y, const Tensor& tape,
                                    const Needs& needs);
// Gradients that can be differentiated again.
std::vector<Tensor> python_differentiable_backward(const ScanInputs& in, const Incoming& grads,
                                                   const Needs& needs);

// The CPU kernel on tensors.
ScanOutputs scan_cpu(const ScanInputs& in, bool tape);
std::vector<Tensor> scan_backward_cpu(const ScanInputs& in, const Incoming& grads, const Tensor& y,
                                      const Tensor& tape, const Needs& needs);

// One scan's weights in the layout of the CPU kernel, for `packed`: of the compute type, flat.
Tensor pack(const std::string& cell, const Tensor& w_ih, const Tensor& w_hh,
            const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
            const std::optional<Tensor>& w_hr);
// What tells whether tensors are still those they were: int64, see fingerprint.cpp.
Tensor fingerprint(TensorList tensors);
// Whether they are, for a call of that many rows; it reads no more of them than such a call pays
// for, so what was written past torch's count of changes is found within kRowsToReadAll rows.
bool unchanged(TensorList tensors, const Tensor& fingerprint, int64_t rows);

// `y.transpose(0, 1)` that is no view to autograd: in place changes of it are those of y.
Tensor transposed(const Tensor& y);

// The facts of a cell that is to run on tensors of that device and dtype; raises for an unknown
// one. On a CPU its code is compiled first where there is none yet and it can be had.
const CellFacts& known_cell(std::string_view name, at::DeviceType device, at::ScalarType dtype);

// Gradients in the order of the op's inputs, present only where needed: x, w_ih.., w_hh.., b_ih..,
// b_hh.., w_hr.., s0..
struct Gradients {
  Tensor x;
  std::vector<Tensor> w_ih, w_hh, b_ih, b_hh, w_hr, s0;

  std::vector<Tensor> flat(const Needs& needs) const;
};

}  // namespace fastrnn
