// Calls of stacks of layers and of cells on plain tensors, which need none of Python's views and
// checks: those take longer than a small layer.
//
// Refused is whatever needs them. Such a call goes through fastrnn/nn/functional.py, with the same
// results:
// - an operand that is a subclass, a wrapper, a view that is conjugated or negated, or not dense;
// - one of another size, dtype or device than the input and the weights ask for. Numbers that are
//   read here, lengths and sizes of batches, must be on the host;
// - all calls under autocast and in modes that override functions; ops.py refuses compiled code and
//   transforms;
// - weights that were packed for the CPU kernel, on a GPU or where gradients are wanted;
// - on a GPU, calls of which C++ knows no launch (cuda_launches.h).
// Where autograd has to record a call, or a mode, tracer or profiler to see it, the operator runs
// through the dispatcher.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/DimVector.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <limits>

#include "binding/cuda_launches.h"
#include "binding/op.h"
#include "binding/plain_tensors.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// The facts of a cell that may run in a fast call now; else null.
const CellFacts* plain_cell(const std::string& name) {
  return at::impl::torch_function_mode_enabled() ? nullptr : find_cell(name);
}

// Whether a device has fast calls, and autocast leaves their operands alone now.
bool has_fast_calls(c10::Device device) {
  if (!device.is_cpu() && !device.is_cuda()) return false;
  return !at::autocast::is_autocast_enabled(at::kCPU) &&
         !at::autocast::is_autocast_enabled(device.type());
}

// What `cells.noise.seeded` makes, in two operations, not four. `order` holds the caller's index of
// every sequence of a packed batch, or is undefined.
Tensor seeded(const std::vector<int64_t>& thresholds, const Tensor& order) {
  const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, at::kLong);
  const int64_t sequences = order.defined() ? order.size(0) : 0;
  Tensor noise = at::empty({static_cast<int64_t>(1 + thresholds.size()) + sequences}, at::kLong);
  int64_t* to = noise.mutable_data_ptr<int64_t>();
  *to = *seed.const_data_ptr<int64_t>();
  to = std::copy(thresholds.begin(), thresholds.end(), to + 1);
  for (int64_t b = 0; b < sequences; ++b)
    to[b] = order.const_data_ptr<int64_t>()[b * order.stride(0)];
  return noise;
}

// The weights of one layer that were packed, as `ops.Prepacked` has them.
struct Packed {
  explicit Packed(const py::tuple& fields)
      : weights(fields[0].cast<std::vector<Tensor>>()),
        fingerprint(fields[1].cast<Tensor>()),
        format(format_named(fields[2].cast<std::string>())) {}

  std::vector<Tensor> weights;
  Tensor fingerprint;
  Format format;
};

// The weights of one layer, for each of its recurrences.
struct PlainWeights {
  c10::SmallVector<Tensor, 2> w_ih, w_hh, b_ih, b_hh, w_hr;
  c10::SmallVector<Tensor, 4> params;
  std::optional<Packed> packed;
};

// How the layers of a call run, as `ops.Ways` says.
struct Ways {
  int64_t directions = 1, heads = 1;
  bool batch_first = false, recompute = false;
  double dropout = 0;  // between layers
};

// The operands of a call of layers, or of one step of a cell, on plain tensors.
class PlainCall {
 public:
  PlainCall(const CellFacts& cell, const Ways& ways)
      : cell_(cell), ways_(ways), recurrences_(ways.directions * ways.heads) {}

  // Each returns false if an operand is not plain or does not fit; x comes first, then weights,
  // then the others. They are on the device of x, except that those whose numbers are read here are
  // on the host. Nothing is computed.

  // One step [B, I].
  bool read_step(py::handle input) {
    if (!read_x(input, 2)) return false;
    batch_ = x_.size(0);
    return true;
  }

  // [T, B, I], or [B, T, I] with `batch_first`.
  bool read_sequences(py::handle input) {
    if (!read_x(input, 3) || x_.numel() == 0) return false;
    steps_ = x_.size(ways_.batch_first ? 1 : 0);
    batch_ = x_.size(ways_.batch_first ? 0 : 1);
    return true;
  }

  // A PackedSequence: (rows, batch_sizes, sorted_indices, unsorted_indices).
  bool read_packed_sequences(const py::tuple& fields) {
    if (fields.size() != 4 || !read_x(fields[0], 2) || x_.numel() == 0) return false;
    const Tensor* sizes = plain_tensor(fields[1], at::kCPU);
    if (!sizes || sizes->scalar_type() != at::kLong || sizes->dim() != 1 || sizes->size(0) == 0)
      return false;
    batch_sizes_ = *sizes;
    steps_ = sizes->size(0);
    batch_ = *sizes->const_data_ptr<int64_t>();
    const auto read = [&](py::handle from, Tensor& to) {
      return from.is_none() || keep(plain_tensor(from, x_.device(), {batch_}, at::kLong), to);
    };
    return read(fields[2], order_) && read(fields[3], restore_);
  }

  // The weights of every recurrence, layer by layer, and those that were packed of every layer, or
  // nothing.
  bool read_weights(const py::list& weights, const py::tuple& packed) {
    const size_t each = recurrences_, layers = weights.size() / each;
    if (layers == 0 || weights.size() % each) return false;
    const auto absent = [](py::handle layer) { return layer.is_none(); };
    const bool frozen = !std::all_of(packed.begin(), packed.end(), absent);
    if (frozen && (packed.size() != layers || std::any_of(packed.begin(), packed.end(), absent)))
      return false;
    layers_.resize(layers);
    for (size_t k = 0; k < weights.size(); ++k) {
      const size_t l = k / each;
      if (frozen && k % each == 0)
        layers_[l].packed.emplace(py::reinterpret_borrow<py::tuple>(packed[l]));
      if (!read_recurrence(weights[k], l)) return false;
    }
    return true;
  }

  // One tensor for a cell with one state, else a tuple.
  bool read_states(py::handle hx) {
    if (cell_.states == 1) return read_state(hx);
    return PyTuple_CheckExact(hx.ptr()) && read_states(py::reinterpret_borrow<py::tuple>(hx));
  }
  bool read_states(const py::tuple& given) {
    if (given.size() != static_cast<size_t>(cell_.states)) return false;
    return std::all_of(given.begin(), given.end(),
                       [&](py::handle state) { return read_state(state); });
  }

  // Steps of each sequence of dense input.
  bool read_lengths(py::handle object) {
    const Tensor* lengths = plain_tensor(object, at::kCPU, {batch_}, at::kLong);
    if (!lengths || x_.dim() != 3) return false;
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t length = lengths->const_data_ptr<int64_t>()[b * lengths->stride(0)];
      if (length < 0 || length > steps_) return false;
    }
    lengths_ = *lengths;
    return true;
  }

  // Whether an episode begins at a step, in the form of dense input.
  bool read_resets(py::handle object) {
    const Tensor* resets = plain_tensor(object, x_.device());
    if (!resets || resets->scalar_type() != at::kBool || x_.dim() != 3) return false;
    resets_ = *resets;
    return resets->sizes() == x_.sizes().slice(0, 2);
  }

  // Chooses the kernels: those for CUDA if C++ knows how to launch them for this call, else those
  // for tensors on a CPU. False for other calls on a GPU.
  bool choose_kernels() {
    static const std::optional<Tensor> absent;
    on_cuda_ = !layers_[0].packed && knows_launch(cell_, inputs_of(0, x_, absent), steps_, batch_);
    return on_cuda_ || x_.is_cpu();
  }

  // Makes dense input time-major. Gives packed input, which needs states, zeros for those that it
  // lacks. Puts states into the order in which the input is packed, and heads side by side.
  void prepare() {
    if (ways_.batch_first && !batch_sizes_) {
      x_ = x_.transpose(0, 1);
      if (resets_) resets_ = resets_->transpose(0, 1);
    }
    if (batch_sizes_ && states_ == 0) {
      for (; states_ < static_cast<size_t>(cell_.states); ++states_) {
        const auto size = state_size(states_);
        s0_[states_] =
            on_cuda_ || observed() ? x_.new_zeros(size) : fresh_zeros(size, x_.scalar_type());
      }
    } else if (order_.defined()) {
      for (size_t s = 0; s < states_; ++s) s0_[s] = permuted(s0_[s], order_);
    }
    if (ways_.heads > 1)
      for (size_t s = 0; s < states_; ++s) s0_[s] = split(s0_[s]);
  }

  const std::optional<Tensor>& batch_sizes() const { return batch_sizes_; }
  const Tensor& order() const { return order_; }

  // Runs one layer after the other: y and the final states. Nothing if the layers are frozen and
  // something must see operations or gradients. `draw` makes the noise of a layer.
  template <class Draw>
  std::optional<std::pair<Tensor, std::vector<Tensor>>> run(const Draw& draw) {
    if (layers_[0].packed &&
        (wants_gradients() || c10::impl::TorchDispatchModeTLS::any_modes_set()))
      return std::nullopt;
    Tensor y = x_;
    c10::SmallVector<std::vector<Tensor>, 4> lasts(layers_.size());
    for (size_t l = 0; l < layers_.size(); ++l) {
      if (l > 0 && ways_.dropout > 0) y = at::dropout(y, ways_.dropout, true);
      std::optional<Tensor> noise;
      if (cell_.draws) noise = draw();
      std::tie(y, lasts[l], std::ignore) = run_layer(l, y, noise);
    }
    if (layers_.size() > 1) {
      c10::SmallVector<Tensor, 4> parts(layers_.size());
      for (size_t s = 0; s < lasts[0].size(); ++s) {
        for (size_t l = 0; l < layers_.size(); ++l) parts[l] = std::move(lasts[l][s]);
        lasts[0][s] = joined(parts, !on_cuda_);
      }
    }
    if (ways_.heads > 1)
      for (Tensor& state : lasts[0]) state = beside(state);
    if (restore_.defined())
      for (Tensor& state : lasts[0]) state = permuted(state, restore_);
    return std::make_pair(std::move(y), std::move(lasts[0]));
  }

 private:
  // Autograd sees operations on all states, since it notices whether saved ones were changed.
  static Tensor permuted(const Tensor& state, const Tensor& order) {
    return run_tracked(at::GradMode::is_enabled() || observed(),
                       [&] { return state.index_select(1, order); });
  }
  // [L*D, B, H] as [L*D*heads, B, H/heads].
  Tensor split(const Tensor& state) const {
    const int64_t count = state.size(0), width = state.size(2) / ways_.heads;
    const Tensor apart = state.view({count, batch_, ways_.heads, width}).transpose(1, 2);
    return apart.reshape({count * ways_.heads, batch_, width});
  }
  // The inverse of `split`.
  Tensor beside(const Tensor& state) const {
    const int64_t count = state.size(0) / ways_.heads, width = state.size(2);
    const Tensor together = state.view({count, ways_.heads, batch_, width}).transpose(1, 2);
    return together.reshape({count, batch_, ways_.heads * width});
  }
  static bool wants_gradients(const ScanInputs& in) {
    if (!at::GradMode::is_enabled()) return false;
    bool wanted = in.x.requires_grad();
    for (TensorList list : in.lists())
      for (const Tensor& tensor : list) wanted |= tensor.requires_grad();
    return wanted;
  }
  bool wants_gradients() const {
    static const std::optional<Tensor> absent;
    for (size_t l = 0; l < layers_.size(); ++l)
      if (wants_gradients(inputs_of(l, x_, absent))) return true;
    return false;
  }

  bool read_x(py::handle input, int64_t dim) {
    return keep(plain_tensor(input), x_) && x_.dim() == dim && has_fast_calls(x_.device());
  }

  // (w_ih, w_hh, b_ih, b_hh, w_hr, params) of one more recurrence of a layer.
  bool read_recurrence(py::handle object, size_t l) {
    if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 6) return false;
    const auto weights = py::reinterpret_borrow<py::tuple>(object);
    PlainWeights& layer = layers_[l];
    const at::ScalarType dtype = x_.scalar_type();
    const c10::Device device = x_.device();
    // A layer that has its weights only in a format of its own passes those, for their sizes.
    const Tensor* matrix = plain_tensor(weights[1], device);
    if (!matrix || matrix->dim() != 2) return false;
    const auto matrix_type = layer.packed ? matrix->scalar_type() : dtype;
    const bool biased = !weights[2].is_none(), projected = !weights[4].is_none();
    if (l == 0 && layer.w_ih.empty()) {
      recurrent_ = hidden_ = matrix->size(1);
      biased_ = biased;
      projected_ = projected;
      const Tensor* projection = projected ? plain_tensor(weights[4], device) : nullptr;
      if (projection && projection->dim() == 2) hidden_ = projection->size(1);
    }
    for (py::handle each : weights[5]) {
      const Tensor* param = plain_tensor(each, device);
      if (!param || param->scalar_type() != dtype) return false;
      layer.params.push_back(*param);
    }
    const auto read = [&](int k, at::IntArrayRef size, at::ScalarType type, auto& to) {
      const Tensor* weight = plain_tensor(weights[k], device, size, type);
      if (weight) to.push_back(*weight);
      return weight != nullptr;
    };
    const int64_t inputs = l ? recurrences_ * recurrent_ : x_.size(-1);
    const int64_t of_u = cell_.input_gates * hidden_, of_v = cell_.recurrent_gates * hidden_;
    return biased == biased_ && biased != weights[3].is_none() && projected == projected_ &&
           read(0, {of_u, inputs}, matrix_type, layer.w_ih) &&
           read(1, {of_v, recurrent_}, matrix_type, layer.w_hh) &&
           (!biased ||
            (read(2, {of_u}, dtype, layer.b_ih) && read(3, {of_v}, dtype, layer.b_hh))) &&
           (!projected || read(4, {recurrent_, hidden_}, matrix_type, layer.w_hr));
  }

  // The size of a state of all layers, or of a cell in one step.
  c10::DimVector state_size(size_t s) const {
    const int64_t width = ways_.heads * (s ? hidden_ : recurrent_);
    if (x_.dim() == 2 && !batch_sizes_) return {batch_, width};
    return {static_cast<int64_t>(layers_.size()) * ways_.directions, batch_, width};
  }

  bool read_state(py::handle object) {
    const Tensor* state = plain_tensor(object, x_.device(), state_size(states_), x_.scalar_type());
    const bool plain = keep(state, s0_[states_]);
    states_ += plain;
    return plain;
  }

  ScanInputs inputs_of(size_t l, const Tensor& x, const std::optional<Tensor>& noise) const {
    const PlainWeights& layer = layers_[l];
    // Of two directions the second half of the recurrences is reversed.
    const uint64_t half = ~uint64_t{0} >> (64 - ways_.heads);
    const auto reverse = ways_.directions == 2 ? static_cast<int64_t>(half << ways_.heads) : 0;
    return {cell_.name,
            x,
            layer.w_ih,
            layer.w_hh,
            layer.b_ih,
            layer.b_hh,
            layer.w_hr,
            layer.params,
            {s0_.data(), states_},
            {},
            batch_sizes_,
            lengths_,
            resets_,
            noise,
            reverse};
  }

  ScanOutputs run_layer(size_t l, const Tensor& x, const std::optional<Tensor>& noise) const {
    ScanInputs in = inputs_of(l, x, noise);
    const bool tracked = observed() || wants_gradients(in);
    std::array<Tensor, kMaxStates> own;  // the states of this layer
    if (layers_.size() > 1) {
      const int64_t first = static_cast<int64_t>(l) * recurrences_;
      for (size_t s = 0; s < states_; ++s)
        own[s] = run_tracked(tracked, [&] { return s0_[s].slice(0, first, first + recurrences_); });
      in.s0 = {own.data(), states_};
    }
    if (const auto& packed = layers_[l].packed) {
      in.packed = packed->weights;
      in.format = packed->format;
      return scan_frozen(in, packed->fingerprint);
    }
    return run_tracked(tracked, [&] {
      if (tracked) return call_scan(in, false, ways_.recompute);
      return on_cuda_ ? scan_launched(in, false) : scan_on_cpu(in, false);
    });
  }

  const CellFacts& cell_;
  const Ways ways_;
  const int64_t recurrences_;  // of each layer
  Tensor x_, order_, restore_;
  std::optional<Tensor> batch_sizes_, lengths_, resets_;
  int64_t steps_ = 1, batch_ = 0;
  c10::SmallVector<PlainWeights, 2> layers_;
  int64_t hidden_ = 0, recurrent_ = 0;  // the widths of the states, the first one's last
  bool biased_ = false, projected_ = false;
  bool on_cuda_ = false;  // whether the kernels are those for CUDA
  std::array<Tensor, kMaxStates> s0_;
  size_t states_ = 0;
};

py::object in_form_of_hx(std::vector<Tensor> states) {
  if (states.size() == 1) return py::cast(std::move(states[0]));
  py::tuple all(states.size());
  for (size_t s = 0; s < states.size(); ++s) all[s] = std::move(states[s]);
  return all;
}

py::object step(const std::string& name, py::handle input, const py::tuple& before,
                const py::object& weights, const py::object& packed) {
  const CellFacts* cell = plain_cell(name);
  if (!cell || cell->draws) return py::none();
  PlainCall call(*cell, {});
  py::list one(1);
  one[0] = weights;
  if (!call.read_step(input) || !call.read_weights(one, py::make_tuple(packed)) ||
      !(before.empty() || call.read_states(before)) || !call.choose_kernels())
    return py::none();
  auto out = [&] {
    py::gil_scoped_release release;
    return call.run([] { return Tensor(); });
  }();
  if (!out) return py::none();
  auto& [y, states] = *out;
  py::tuple after(states.size());
  after[0] = std::move(y);  // which is the first state, too
  for (size_t s = 1; s < states.size(); ++s) after[s] = std::move(states[s]);
  return after;
}

py::object layers(const std::string& name, const py::object& input, const py::object& hx,
                  const py::list& weights, const py::object& check, const py::object& lengths,
                  const py::object& resets, const std::vector<int64_t>& thresholds,
                  const py::object& noise,
                  const std::tuple<bool, int64_t, bool, bool, double>& given_ways,
                  const py::tuple& packed) {
  const auto [bidirectional, heads, batch_first, recompute, dropout] = given_ways;
  const CellFacts* cell = plain_cell(name);
  if (!cell) return py::none();
  PlainCall call(*cell, {bidirectional ? 2 : 1, heads, batch_first, recompute, dropout});
  const bool rows = PyTuple_Check(input.ptr());
  if (!(rows ? call.read_packed_sequences(input) : call.read_sequences(input)) ||
      !call.read_weights(weights, packed) || !(hx.is_none() || call.read_states(hx)) ||
      !(lengths.is_none() || call.read_lengths(lengths)) ||
      !(resets.is_none() || call.read_resets(resets)) || !call.choose_kernels())
    return py::none();
  check(rows ? py::object(input[py::int_(0)]) : input, hx, call.batch_sizes(),
        weights[0][py::int_(0)]);
  const auto draw = [&] {
    if (!observed()) return seeded(thresholds, call.order());
    py::gil_scoped_acquire gil;
    return noise().cast<Tensor>();
  };
  auto out = [&] {
    py::gil_scoped_release release;
    call.prepare();
    return call.run(draw);
  }();
  if (!out) return py::none();
  auto& [y, last] = *out;
  // torch.nn's LSTM returns a view here; its RNN and GRU, with one state, do not.
  if (batch_first && !rows) y = cell->states == 1 ? transposed(y) : y.transpose(0, 1);
  return py::make_tuple(std::move(y), in_form_of_hx(std::move(last)));
}

}  // namespace

void bind_plain_calls(py::module_& m) {
  m.def("step", step, "One step of a cell on plain tensors; None for others.", py::arg("cell"),
        py::arg("input"), py::arg("before"), py::arg("weights"), py::arg("packed"));
  m.def("layers", layers,
        "Layers on plain tensors, one after the other, once `check` accepts them; None for others.",
        py::arg("cell"), py::arg("input"), py::arg("hx"), py::arg("weights"), py::arg("check"),
        py::arg("lengths"), py::arg("resets"), py::arg("thresholds"), py::arg("noise"),
        py::arg("ways"), py::arg("packed"));
}

}  // namespace fastrnn
