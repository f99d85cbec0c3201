// The operator: its schemas, and the choice of the kernel for a call.
#include "binding/op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

#include "binding/callbacks.h"
#include "binding/cpu_kernel.h"
#include "binding/cuda_kernel.h"
#include "binding/fingerprint.h"
#include "binding/plan_cache.h"
#include "binding/schema.h"

namespace fastrnn {
namespace {

ScanOutputs from_list(std::vector<Tensor> list) {
  ScanOutputs out;
  auto& [y, states, tape] = out;
  y = std::move(list.front());
  tape = std::move(list.back());
  states.assign(std::make_move_iterator(list.begin() + 1), std::make_move_iterator(list.end() - 1));
  return out;
}

Problem problem_of(const Call& call, Format format, bool tape, bool backward) {
  const auto& [cell, in, n, tables] = call;
  return {in.cell, n.T,      n.B,         tables.live_rows(), n.I,   n.H, n.P, in.x.scalar_type(),
          tape,    backward, n.projected, !in.packed.empty(), format};
}

// The cell of a call on a CPU, with code in the format of its products if it can have that.
const CellFacts& cell_of(const ScanInputs& in) {
  return known_cell(in.cell, at::kCPU, format_of(in));
}

std::vector<Tensor> launched_backward(const ScanInputs& in, const OutputGrads& grads,
                                      const Tensor& y, const Tensor& tape, const Needs& needs) {
  if (auto out = backward_on_cuda(in, grads, y, tape, needs)) return *std::move(out);
  return python_backward(in, grads, y, tape, needs);
}

}  // namespace

ScanOutputs scan_launched(const ScanInputs& in, bool tape) {
  // Autograd has done so, except in inference mode. at::linear multiplies in another order if it
  // finds that weights have gradients.
  at::AutoDispatchBelowADInplaceOrView below;
  if (std::optional<ScanOutputs> out = forward_on_cuda(in, tape)) return *std::move(out);
  return python_forward(in, tape);
}

ScanOutputs scan_on_cpu(const ScanInputs& in, bool tape) {
  const CellFacts& cell = cell_of(in);
  const Format format = format_of(in);
  const Call call(cell, in);
  const auto plan = cpu_plan(call.cell, problem_of(call, format, tape, false));
  if (plan) return forward_on_cpu(call, *plan, tape);
  TORCH_CHECK(in.packed.empty() || is_plain(format),
              "fastrnn: another kernel than 'cpu' was asked for by name, but a quantised layer in "
              "compiled code has weights for that one only");
  return scan_launched(in, tape);
}

ScanOutputs call_scan(const ScanInputs& in, bool tape, bool recompute, Tensor* steps) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastrnn::scan", "")
                       .typed<std::vector<Tensor>(FASTRNN_SCAN_PARAMETERS, bool, bool, bool)>();
  std::vector<Tensor> list =
      op.call(in.cell, in.x, in.w_ih, in.w_hh, or_none(in.b_ih), or_none(in.b_hh), or_none(in.w_hr),
              or_none(in.params), or_none(in.s0), or_none(in.reset_states), in.batch_sizes,
              in.lengths, in.resets, in.noise, in.reverse, tape, recompute, steps != nullptr);
  if (steps) {
    *steps = std::move(list[list.size() - 2]);
    list.erase(list.end() - 2);
  }
  return from_list(std::move(list));
}

std::vector<Tensor> call_packed(const ScanInputs& in, const Tensor& expected, bool steps) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastrnn::scan_packed", "")
                       .typed<std::vector<Tensor>(FASTRNN_PACKED_PARAMETERS, bool)>();
  return op.call(in.cell, in.x, in.w_ih, in.w_hh, or_none(in.b_ih), or_none(in.b_hh),
                 or_none(in.w_hr), or_none(in.params), or_none(in.s0), or_none(in.reset_states),
                 in.batch_sizes, in.lengths, in.resets, in.noise, in.reverse, in.packed, expected,
                 name_of(in.format), steps);
}

// For a frozen layer. `in` has the weights for their sizes, and for kernels other than the CPU
// kernel.
ScanOutputs scan_frozen(const ScanInputs& in, const Tensor& expected, bool tape) {
  c10::SmallVector<Tensor, 4> weights;
  for (TensorList list : {in.w_ih, in.w_hh, in.b_ih, in.b_hh, in.w_hr, in.params})
    weights.insert(weights.end(), list.begin(), list.end());
  // The check reads weights as the caller has them, in float. A step in another format reads far
  // fewer bytes, so it pays for a smaller share of the check.
  const int64_t rows = in.x.numel() / std::max<int64_t>(in.x.size(-1), 1);
  const int64_t share = is_plain(in.format) ? 1 : 8;
  TORCH_CHECK(
      unchanged(weights, expected, (rows + share - 1) / share),
      "fastrnn: the weights of a frozen layer were changed or replaced after freezing. Call "
      "fastrnn.freeze(module) again to use the new ones, or fastrnn.unfreeze(module) before "
      "changing them; of a quantised layer, fastrnn.quantize_(module) or "
      "fastrnn.dequantize_(module)");
  return scan_on_cpu(in, tape);
}

namespace {

// The list of the schema, from a call that made a tape if `tape` or `steps` are wanted.
std::vector<Tensor> with_steps(ScanOutputs out, bool tape, bool steps) {
  if (!steps) return as_list(std::move(out));
  const Tensor states = steps_of(out);
  Tensor& saved = std::get<2>(out);
  if (!tape) saved = saved.new_empty({0, saved.size(1), saved.size(2), saved.size(3)});
  return as_list(std::move(out), states);
}

// `recompute` is for autograd, which runs before these kernels.
std::vector<Tensor> cpu(FASTRNN_SCAN_PARAMETERS, bool tape, bool, bool steps) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  // If x and the weights are inference tensors, the dispatcher skips autograd; it does not look at
  // the other tensors.
  if (x.is_inference() && at::GradMode::is_enabled() &&
      !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCPU))
    for (TensorList list : in.lists())
      for (const Tensor& tensor : list)
        TORCH_CHECK(!tensor.requires_grad(),
                    "scan: a bias or state requires gradients, but x and the weights are inference "
                    "tensors, which cannot be saved for backward; clone them outside "
                    "torch.inference_mode()");
  return with_steps(scan_on_cpu(in, tape || steps), tape, steps);
}

std::vector<Tensor> cpu_packed(FASTRNN_PACKED_PARAMETERS, bool steps) {
  ScanInputs in = FASTRNN_SCAN_INPUTS;
  in.packed = packed;
  in.format = format_named(format);
  ScanOutputs out = scan_frozen(in, expected, steps);
  const Tensor states = steps ? steps_of(out) : Tensor();
  std::get<2>(out).reset();
  return as_list(std::move(out), states);
}

// For other devices, whose kernels Python plans.
std::vector<Tensor> python_kernel(FASTRNN_SCAN_PARAMETERS, bool tape, bool, bool steps) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  check_recurrences(in);
  known_cell(cell, x.device().type(), plain_format(x.scalar_type()));
  return with_steps(scan_launched(in, tape || steps), tape, steps);
}

OutputGrads output_grads(const std::optional<Tensor>& dy,
                         const c10::List<std::optional<Tensor>>& dstates,
                         const std::optional<Tensor>& dsteps) {
  OutputGrads grads;
  if (dy) grads.dy = *dy;
  if (dsteps) grads.dsteps = *dsteps;
  for (std::optional<Tensor> grad : dstates) grads.dstates.push_back(grad ? *grad : Tensor());
  return grads;
}

std::vector<Tensor> backward_cpu(FASTRNN_BACKWARD_PARAMETERS) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  const OutputGrads grads = output_grads(dy, dstates, dsteps);
  const CellFacts& known = cell_of(in);
  const Format format = format_of(x.scalar_type());
  const Call call(known, in);
  const auto plan = cpu_plan(call.cell, problem_of(call, format, true, true));
  if (!plan) return launched_backward(in, grads, y, tape, needs);
  const bool has_tape = call.n.R == 0 || tape.size(0) > 0;
  return backward_on_cpu(call, *plan, grads, y,
                         has_tape ? tape : std::get<2>(scan_on_cpu(in, true)), needs);
}

std::vector<Tensor> python_backward_kernel(FASTRNN_BACKWARD_PARAMETERS) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  known_cell(cell, x.device().type(), plain_format(x.scalar_type()));
  return launched_backward(in, output_grads(dy, dstates, dsteps), y, tape, needs);
}

}  // namespace

TORCH_LIBRARY(fastrnn, m) {
  // kernels/operands.py documents the arguments. Returns y, the S states, with `steps` the states
  // past the first after every step, [rows, P, S-1, H], and the tape, which scan_backward needs and
  // which has no rows unless `tape` asks for it. With `recompute`, autograd keeps no tape and gives
  // scan_backward one without rows. Lists that may be empty are optional, because ahead-of-time
  // compiled programs pass an empty list as none.
  m.def(
      "scan(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, "
      "Tensor[]? w_hr, Tensor[]? params, Tensor[]? s0, Tensor[]? reset_states, Tensor? "
      "batch_sizes, Tensor? lengths, "
      "Tensor? resets, Tensor? noise, int reverse, bool tape=False, bool recompute=False, bool "
      "steps=False) "
      "-> Tensor[]");
  // Returns y, the states and, with `steps`, those after every step, from weights that pack()
  // packed in that format; `expected` is their fingerprint() of that time. It is a tensor, because
  // a number would be a constant of a traced graph.
  m.def(
      "scan_packed(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, "
      "Tensor[]? b_hh, Tensor[]? w_hr, Tensor[]? params, Tensor[]? s0, Tensor[]? reset_states, "
      "Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? resets, Tensor? noise, int reverse, Tensor[] packed, "
      "Tensor expected, str format, bool steps=False) -> Tensor[]");
  // Returns gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states; `needs`
  // selects from x, w_ih, w_hh, biases, w_hr, params, s0, reset_states.
  m.def(
      "scan_backward(str cell, Tensor? dy, Tensor?[] dstates, Tensor? dsteps, Tensor x, "
      "Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, Tensor[]? w_hr, "
      "Tensor[]? params, Tensor[]? s0, Tensor[]? reset_states, Tensor? batch_sizes, Tensor? "
      "lengths, Tensor? resets, "
      "Tensor? noise, int reverse, Tensor y, Tensor tape, bool[8] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("scan", cpu);
  m.impl("scan_packed", cpu_packed);
  m.impl("scan_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("scan", python_kernel);
  m.impl("scan_backward", python_backward_kernel);
}

// Gradients were refused in Python; this skips torch's slow autograd fallback.
TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("scan_packed", torch::CppFunction::makeFallthrough());
}

}  // namespace fastrnn
