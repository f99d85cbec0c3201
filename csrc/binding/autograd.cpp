// Autograd of `scan`, in C++ because a call costs a fifth of what it costs in Python.
#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "binding/callbacks.h"
#include "binding/fingerprint.h"
#include "binding/op.h"
#include "binding/schema.h"

namespace fastrnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Autograd takes all tensors as one flat list; these sizes say where each list in it ends.
struct Sizes {
  int64_t recurrences, b, w_hr, params, s0, reset_states;
};

variable_list flattened(const ScanInputs& in) {
  variable_list flat;
  flat.reserve(1 + 5 * in.w_hh.size() + in.params.size() + in.s0.size() + in.reset_states.size());
  flat.push_back(in.x);
  for (TensorList list : in.lists()) flat.insert(flat.end(), list.begin(), list.end());
  return flat;
}

ScanInputs unflattened(std::string_view cell, TensorList flat, const Sizes& n,
                       const std::optional<Tensor>& batch_sizes,
                       const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
                       const std::optional<Tensor>& noise, int64_t reverse) {
  size_t at = 1;
  auto next = [&](int64_t count) {
    TensorList part = flat.slice(at, count);
    at += count;
    return part;
  };
  const TensorList w_ih = next(n.recurrences), w_hh = next(n.recurrences), b_ih = next(n.b),
                   b_hh = next(n.b), w_hr = next(n.w_hr), params = next(n.params), s0 = next(n.s0),
                   reset_states = next(n.reset_states);
  return {cell, flat[0],      w_ih,        w_hh,    b_ih,   b_hh,  w_hr,   params,
          s0,   reset_states, batch_sizes, lengths, resets, noise, reverse};
}

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

std::vector<Tensor> call_scan_backward(const ScanInputs& in, const OutputGrads& grads,
                                       const Tensor& y, const Tensor& tape, const Needs& needs) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastrnn::scan_backward", "")
                       .typed<std::vector<Tensor>(FASTRNN_BACKWARD_PARAMETERS)>();
  c10::List<std::optional<Tensor>> dstates;
  for (const Tensor& grad : grads.dstates)
    dstates.push_back(grad.defined() ? std::optional<Tensor>(grad) : std::nullopt);
  return op.call(in.cell, optional(grads.dy), dstates, optional(grads.dsteps), in.x, in.w_ih,
                 in.w_hh, or_none(in.b_ih), or_none(in.b_hh), or_none(in.w_hr), or_none(in.params),
                 or_none(in.s0), or_none(in.reset_states), in.batch_sizes, in.lengths, in.resets,
                 in.noise, in.reverse, y, tape, needs);
}

// The data that backward needs besides tensors. It is one object, because each entry of a context
// costs as much as a small layer.
struct Recorded : torch::CustomClassHolder {
  Recorded(std::string cell, int64_t reverse, const Sizes& sizes, const Tensor& y, size_t states)
      : cell(std::move(cell)),
        reverse(reverse),
        sizes(sizes),
        states(states),
        y_counter(y.unsafeGetTensorImpl()->version_counter()),
        y_version(y_counter.current_version()),
        y_samples(samples(y)) {}
  // Whether y was changed in place: by its version counter or, for changes past that (`.data`,
  // NumPy), by samples. `now` shares the memory of y but not its counter.
  bool y_changed(const Tensor& now) const {
    return y_counter.current_version() != y_version || samples(now) != y_samples;
  }

  std::string cell;
  int64_t reverse;
  Sizes sizes;
  size_t states;
  c10::VariableVersion y_counter;
  uint32_t y_version;
  uint64_t y_samples;
};

// Whether vmap runs over gradients, as with is_grads_batched: only plain operations can be batched.
bool batched(const variable_list& grads) {
  for (const Tensor& grad : grads)
    if (grad.defined() && grad.key_set().has_any(c10::DispatchKeySet(
                              {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched})))
      return true;
  return false;
}

class ScanFunction : public torch::autograd::Function<ScanFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const std::string& cell, const Sizes& sizes,
                               TensorList flat, const std::optional<Tensor>& batch_sizes,
                               const std::optional<Tensor>& lengths,
                               const std::optional<Tensor>& resets,
                               const std::optional<Tensor>& noise, int64_t reverse, bool recompute,
                               bool with_steps) {
    at::AutoDispatchBelowADInplaceOrView below;
    const ScanInputs in =
        unflattened(cell, flat, sizes, batch_sizes, lengths, resets, noise, reverse);
    Tensor steps;
    auto [y, states, tape] = call_scan(in, !recompute, false, with_steps ? &steps : nullptr);
    variable_list saved = flat.vec();
    for (const auto& tensor : {batch_sizes, lengths, resets, noise})
      saved.push_back(tensor ? *tensor : Tensor());
    // The caller may change y in place, as torch.nn allows for most of its layers: so y is saved
    // with a version counter of its own, and computed again if it was changed.
    ctx->saved_data["call"] = c10::IValue::make_capsule(
        c10::make_intrusive<Recorded>(cell, reverse, sizes, y, states.size()));
    saved.push_back(y.variable_data());
    saved.push_back(tape);
    ctx->save_for_backward(std::move(saved));
    ctx->mark_non_differentiable({tape});
    ctx->set_materialize_grads(false);
    variable_list out{y};
    out.insert(out.end(), states.begin(), states.end());
    if (with_steps) out.push_back(steps);
    out.push_back(tape);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // Operands have their final dtypes, even if backward() is called within autocast.
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto call =
        c10::static_intrusive_pointer_cast<Recorded>(ctx->saved_data["call"].toCapsule());
    const Sizes& sizes = call->sizes;
    const variable_list saved = ctx->get_saved_variables();
    const size_t flat_size = saved.size() - 6;
    const auto batch_sizes = optional(saved[flat_size]), lengths = optional(saved[flat_size + 1]),
               resets = optional(saved[flat_size + 2]), noise = optional(saved[flat_size + 3]);
    const ScanInputs in = unflattened(call->cell, TensorList(saved.data(), flat_size), sizes,
                                      batch_sizes, lengths, resets, noise, call->reverse);
    // Of y, the states, perhaps the states after every step, and the tape.
    const auto last = grads.begin() + 1 + call->states;
    OutputGrads output_grads{grads[0], {grads.begin() + 1, last}, {}};
    if (grads.size() > call->states + 2) output_grads.dsteps = *last;

    auto needed = [&](size_t first, int64_t count) {
      for (size_t i = first; i < first + count; ++i)
        if (ctx->needs_input_grad(i)) return true;
      return false;
    };
    const size_t w_ih = 1, w_hh = w_ih + sizes.recurrences, b = w_hh + sizes.recurrences,
                 w_hr = b + 2 * sizes.b, params = w_hr + sizes.w_hr, s0 = params + sizes.params,
                 reset_states = s0 + sizes.s0;
    const Needs needs{needed(0, 1),
                      needed(w_ih, sizes.recurrences),
                      needed(w_hh, sizes.recurrences),
                      needed(b, 2 * sizes.b),
                      needed(w_hr, sizes.w_hr),
                      needed(params, sizes.params),
                      needed(s0, sizes.s0),
                      needed(reset_states, sizes.reset_states)};
    std::vector<Tensor> gradients;
    if (at::GradMode::is_enabled() || batched(grads)) {
      gradients = python_differentiable_backward(in, output_grads, needs);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      Tensor y = saved[flat_size + 4], tape = saved[flat_size + 5];
      if (call->y_changed(y)) std::tie(y, std::ignore, tape) = call_scan(in, true);
      gradients = call_scan_backward(in, output_grads, y, tape, needs);
    }

    variable_list out(kFlatArgument + flat_size + 7);
    auto next = gradients.begin();
    auto place = [&](bool present, size_t first, int64_t count) {
      for (size_t i = first; present && i < first + count; ++i) out[kFlatArgument + i] = *next++;
    };
    place(needs[kNeedX], 0, 1);
    place(needs[kNeedWih], w_ih, sizes.recurrences);
    place(needs[kNeedWhh], w_hh, sizes.recurrences);
    place(needs[kNeedBias], b, 2 * sizes.b);
    place(needs[kNeedWhr], w_hr, sizes.w_hr);
    place(needs[kNeedParams], params, sizes.params);
    place(needs[kNeedStates], s0, sizes.s0);
    place(needs[kNeedResetStates], reset_states, sizes.reset_states);
    return out;
  }

 private:
  static constexpr size_t kFlatArgument = 2;  // after `cell` and `sizes`
};

std::vector<Tensor> scan_autograd(FASTRNN_SCAN_PARAMETERS, bool tape, bool recompute, bool steps) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  TORCH_CHECK(in.b_ih.size() == in.b_hh.size(), "scan: b_ih and b_hh come together, got ",
              in.b_ih.size(), " and ", in.b_hh.size());
  bool differentiable = x.requires_grad();
  for (TensorList list : in.lists())
    for (const Tensor& tensor : list) differentiable |= tensor.requires_grad();
  if (!differentiable || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor states;
    ScanOutputs out = call_scan(in, tape, false, steps ? &states : nullptr);
    return as_list(std::move(out), states);
  }
  const Sizes sizes{
      static_cast<int64_t>(in.w_hh.size()), static_cast<int64_t>(in.b_ih.size()),
      static_cast<int64_t>(in.w_hr.size()), static_cast<int64_t>(in.params.size()),
      static_cast<int64_t>(in.s0.size()),   static_cast<int64_t>(in.reset_states.size())};
  const variable_list flat = flattened(in);
  return ScanFunction::apply(std::string(cell), sizes, TensorList(flat), batch_sizes, lengths,
                             resets, noise, reverse, recompute, steps);
}

// y.transpose(0, 1), which shares memory and version counter with y, as a view does.
Tensor transposed_alias(const Tensor& y) {
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor alias = y.transpose(0, 1);
  if (!y.is_inference())
    alias.unsafeGetTensorImpl()->set_version_counter(y.unsafeGetTensorImpl()->version_counter());
  return alias;
}

class TransposeFunction : public torch::autograd::Function<TransposeFunction> {
 public:
  static Tensor forward(AutogradContext*, const Tensor& y) { return transposed_alias(y); }
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0].defined() ? grads[0].transpose(0, 1) : Tensor()};
  }
};

}  // namespace

Tensor transposed(const Tensor& y) {
  return y.requires_grad() && at::GradMode::is_enabled() ? TransposeFunction::apply(y)
                                                         : transposed_alias(y);
}

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) { m.impl("scan", scan_autograd); }

}  // namespace fastrnn
