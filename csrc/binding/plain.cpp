// Calls of layers and cells on plain tensors, which need none of Python's views and checks: those
// take longer than a small layer.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <limits>

#include "binding/op.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

constexpr size_t kMostPlain = 2;  // recurrences: one for each direction of a layer

// Weights that were packed, as `ops.Prepacked` has them.
using Packed = std::optional<std::vector<Tensor>>;

// The tensor in `object` if it is plain: of torch's own classes, dense, on a CPU; else null.
const Tensor* plain_tensor(py::handle object) {
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(THPVariableClass) &&
      Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(ParameterClass))
    return nullptr;
  const Tensor& t = THPVariable_Unpack(object.ptr());
  constexpr c10::DispatchKeySet unusual{c10::DispatchKey::Python, c10::DispatchKey::Negative,
                                        c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor};
  const bool plain =
      t.layout() == at::kStrided && t.is_cpu() && !t.is_nested() && !t.key_set().has_any(unusual);
  return plain ? &t : nullptr;
}

// The same for a tensor that must have a size and a dtype.
const Tensor* plain_tensor(py::handle object, at::IntArrayRef size, at::ScalarType dtype) {
  const Tensor* t = plain_tensor(object);
  return t && t->scalar_type() == dtype && t->sizes() == size ? t : nullptr;
}

// The facts of a cell that may run in a fast call now; else null.
const CellFacts* plain_cell(const std::string& name) {
  if (at::impl::torch_function_mode_enabled() || at::autocast::is_autocast_enabled(at::kCPU))
    return nullptr;
  return find_cell(name);
}

// Whether something in torch's state has to see the operator: a mode, transform, tracer or
// profiler. Otherwise the dispatcher is left out, which takes as long as a small layer.
bool observed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !c10::default_included_set.has_all(included) ||
         at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

// What `cells.noise.seeded` makes for a batch in the caller's order, in two operations, not four.
Tensor seeded(const std::vector<int64_t>& thresholds) {
  const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, at::kLong);
  Tensor noise = at::empty({static_cast<int64_t>(1 + thresholds.size())}, at::kLong);
  int64_t* to = noise.mutable_data_ptr<int64_t>();
  *to = *seed.const_data_ptr<int64_t>();
  std::copy(thresholds.begin(), thresholds.end(), to + 1);
  return noise;
}

// The operands of a call on plain tensors.
class PlainCall {
 public:
  PlainCall(const CellFacts& cell, const Packed& packed, const std::string& format)
      : cell_(cell), packed_(packed) {
    if (packed) format_ = format_named(format);
  }

  // Each returns false if an operand is not plain or does not fit; x comes first, then weights.
  // x is [B, I], one step, or [T, B, I].
  bool read_x(py::handle input, int64_t dimensions) {
    const Tensor* x = plain_tensor(input);
    if (!x || x->dim() != dimensions) return false;
    x_ = *x;
    return true;
  }

  // (w_ih, w_hh, b_ih, b_hh, w_hr, params) of one more recurrence.
  bool read_weights(py::handle object) {
    if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 6) return false;
    const auto weights = py::reinterpret_borrow<py::tuple>(object);
    const at::ScalarType dtype = x_.scalar_type();
    // A layer that has its weights only in a format of its own passes those, for their sizes.
    const Tensor* matrix = plain_tensor(weights[1]);
    if (!matrix || matrix->dim() != 2 || !weights[4].is_none()) return false;
    const auto matrix_type = packed_ ? matrix->scalar_type() : dtype;
    const size_t p = recurrences_++;
    if (p == 0) hidden_ = matrix->size(1);
    const int64_t of_u = cell_.input_gates * hidden_, of_v = cell_.recurrent_gates * hidden_;
    const bool biased = !weights[2].is_none();
    const auto keep = [](const Tensor* from, Tensor& to) {
      if (from) to = *from;
      return from != nullptr;
    };
    if (p == 0) biased_ = biased;
    for (py::handle each : weights[5]) {
      const Tensor* param = plain_tensor(each);
      if (!param || param->scalar_type() != dtype) return false;
      params_.push_back(*param);
    }
    return biased == biased_ && biased != weights[3].is_none() &&
           keep(plain_tensor(weights[0], {of_u, x_.size(-1)}, matrix_type), w_ih_[p]) &&
           keep(plain_tensor(weights[1], {of_v, hidden_}, matrix_type), w_hh_[p]) &&
           (!biased || (keep(plain_tensor(weights[2], {of_u}, dtype), b_ih_[p]) &&
                        keep(plain_tensor(weights[3], {of_v}, dtype), b_hh_[p])));
  }

  bool read_state(py::handle object) {
    const int64_t batch = x_.size(x_.dim() - 2), P = recurrences_;
    const Tensor* state = x_.dim() == 2
                              ? plain_tensor(object, {batch, hidden_}, x_.scalar_type())
                              : plain_tensor(object, {P, batch, hidden_}, x_.scalar_type());
    if (!state) return false;
    s0_[states_++] = *state;
    return true;
  }
  bool read_states(const py::tuple& given) {
    if (given.size() != static_cast<size_t>(cell_.states)) return false;
    for (py::handle state : given)
      if (!read_state(state)) return false;
    return true;
  }

  // Swaps batch and time.
  void transpose_x() { x_ = x_.transpose(0, 1); }

  const Tensor& x() const { return x_; }

  // Runs the call; nothing if the layer is frozen and something must see operations or gradients.
  std::optional<ScanOutputs> run(const std::optional<Tensor>& expected, bool recompute,
                                 const std::optional<Tensor>& noise = std::nullopt) {
    static const std::optional<Tensor> absent;
    const size_t biases = biased_ ? recurrences_ : 0;
    ScanInputs in{cell_.name,
                  x_,
                  {w_ih_.data(), recurrences_},
                  {w_hh_.data(), recurrences_},
                  {b_ih_.data(), biases},
                  {b_hh_.data(), biases},
                  {},
                  params_,
                  {s0_.data(), states_},
                  {},
                  absent,
                  absent,
                  absent,
                  noise,
                  recurrences_ == 2 ? 2 : 0};
    const bool differentiable = wants_gradients(in);
    if (packed_) {
      if (differentiable || c10::impl::TorchDispatchModeTLS::any_modes_set()) return std::nullopt;
      in.packed = *packed_;
      in.format = format_;
    }
    py::gil_scoped_release release;
    if (packed_) return scan_frozen(in, *expected);
    if (differentiable || observed()) return call_scan(in, false, recompute);
    at::AutoDispatchBelowADInplaceOrView below;
    return scan_on_cpu(in, false);
  }

 private:
  static bool wants_gradients(const ScanInputs& in) {
    if (!at::GradMode::is_enabled()) return false;
    bool wanted = in.x.requires_grad();
    for (TensorList list : in.lists())
      for (const Tensor& tensor : list) wanted |= tensor.requires_grad();
    return wanted;
  }

  const CellFacts& cell_;
  const Packed& packed_;
  Format format_ = Format::kFloat;
  Tensor x_;
  std::array<Tensor, kMostPlain> w_ih_, w_hh_, b_ih_, b_hh_;
  c10::SmallVector<Tensor, 4> params_;
  std::array<Tensor, kMaxStates> s0_;
  size_t recurrences_ = 0, states_ = 0;
  int64_t hidden_ = 0;
  bool biased_ = false;
};

py::object step(const std::string& name, py::handle input, const py::tuple& before,
                py::handle weights, const Packed& packed, const std::optional<Tensor>& expected,
                const std::string& format) {
  const CellFacts* cell = plain_cell(name);
  if (!cell || cell->draws) return py::none();
  PlainCall call(*cell, packed, format);
  if (!call.read_x(input, 2) || !call.read_weights(weights) ||
      !(before.empty() || call.read_states(before)))
    return py::none();
  auto out = call.run(expected, false);
  if (!out) return py::none();
  auto& [y, states, tape] = *out;
  py::tuple after(states.size());
  after[0] = std::move(y);  // which is the first state, too
  for (size_t s = 1; s < states.size(); ++s) after[s] = std::move(states[s]);
  return after;
}

py::object layer(const std::string& name, py::handle input, py::handle hx, const py::list& weights,
                 const py::object& check, const std::vector<int64_t>& thresholds,
                 const py::object& noise, bool bidirectional, bool batch_first, bool recompute,
                 const Packed& packed, const std::optional<Tensor>& expected,
                 const std::string& format) {
  const CellFacts* cell = plain_cell(name);
  if (!cell || weights.size() != (bidirectional ? 2 : 1)) return py::none();
  PlainCall call(*cell, packed, format);
  if (!call.read_x(input, 3) || call.x().numel() == 0) return py::none();
  if (batch_first) call.transpose_x();
  for (py::handle each : weights)
    if (!call.read_weights(each)) return py::none();
  const bool one = cell->states == 1;
  if (!hx.is_none()) {
    if (one ? !call.read_state(hx)
            : !PyTuple_CheckExact(hx.ptr()) ||
                  !call.read_states(py::reinterpret_borrow<py::tuple>(hx)))
      return py::none();
  }
  check(input, hx, py::none(), weights[0][py::int_(0)]);
  std::optional<Tensor> drawn;
  if (cell->draws) drawn = observed() ? noise().cast<Tensor>() : seeded(thresholds);
  auto out = call.run(expected, recompute, drawn);
  if (!out) return py::none();
  auto& [y, states, tape] = *out;
  // torch.nn's LSTM returns a view here; its RNN and GRU, with one state, do not.
  if (batch_first) y = one ? transposed(y) : y.transpose(0, 1);
  if (one) return py::make_tuple(std::move(y), std::move(states[0]));
  py::tuple last(states.size());
  for (size_t s = 0; s < states.size(); ++s) last[s] = std::move(states[s]);
  return py::make_tuple(std::move(y), std::move(last));
}

}  // namespace

void bind_plain_calls(py::module_& m) {
  m.def("step", step, "One step of a cell on plain tensors; None for others.", py::arg("cell"),
        py::arg("input"), py::arg("before"), py::arg("weights"), py::arg("packed") = std::nullopt,
        py::arg("expected") = std::nullopt, py::arg("format") = "float32");
  m.def("layer", layer, "A layer on plain tensors, once `check` accepts them; None for others.",
        py::arg("cell"), py::arg("input"), py::arg("hx"), py::arg("weights"), py::arg("check"),
        py::arg("thresholds"), py::arg("noise"), py::arg("bidirectional"), py::arg("batch_first"),
        py::arg("recompute"), py::arg("packed") = std::nullopt, py::arg("expected") = std::nullopt,
        py::arg("format") = "float32");
}

}  // namespace fastrnn
