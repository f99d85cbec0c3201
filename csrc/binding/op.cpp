// The operator: schemas, dispatch, autocast, and what Python sees of this library.
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <map>

#include "binding/call.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// Functions of fastrnn/kernels.py, set once on import. Leaked on purpose: no destructor may run
// after the interpreter is gone.
struct Callbacks {
  py::object plan, find, forward, backward, differentiable_backward;
};
Callbacks* callbacks = nullptr;

const Callbacks& python() {
  TORCH_CHECK(callbacks, "fastrnn._C was loaded without `import fastrnn`");
  return *callbacks;
}

std::atomic<int64_t> plans_epoch{0};

using PlanKey = std::tuple<const CellFacts*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                           at::ScalarType, at::DeviceType, bool, bool, bool, bool, int>;

constexpr size_t kMostPlans = 4096;  // batches of ever new lengths must not fill the memory

py::tuple inputs_to_python(const ScanInputs& in) {
  return py::make_tuple(std::string(in.cell), in.x, in.w_ih.vec(), in.w_hh.vec(), in.b_ih.vec(),
                        in.b_hh.vec(), in.w_hr.vec(), in.s0.vec(), in.batch_sizes, in.lengths,
                        in.resets, in.reverse);
}

py::list incoming_to_python(const Incoming& grads) {
  py::list list;
  list.append(grads.dy.defined() ? py::cast(grads.dy) : py::none());
  for (const Tensor& each : grads.dstates)
    list.append(each.defined() ? py::cast(each) : py::none());
  return list;
}

// An op's implementation runs below autograd; a reference that is differentiated needs it back.
class WithAutograd {
 public:
  WithAutograd()
      : guard_(c10::impl::tls_local_dispatch_key_set().included_,
               c10::impl::tls_local_dispatch_key_set().excluded_ -
                   c10::autograd_dispatch_keyset_with_ADInplaceOrView) {}

 private:
  c10::impl::ForceDispatchKeyGuard guard_;
};

}  // namespace

const CellFacts& known_cell(std::string_view name, at::DeviceType device, at::ScalarType dtype) {
  const CellFacts* cell = find_cell(std::string(name));
  const bool in_double = dtype == at::kDouble;
  if (!cell || (device == at::kCPU && !cell->compiled[in_double])) {
    // A program exported elsewhere knows cells that are declared but not yet used here, and may run
    // in another dtype than the cell did so far.
    py::gil_scoped_acquire gil;
    python().find(std::string(name), c10::DeviceTypeName(device, /*lower_case=*/true), in_double);
    cell = find_cell(std::string(name));
  }
  TORCH_CHECK(cell, "fastrnn: no cell is registered under '", name,
              "'; import the module that declares it before it is used");
  return *cell;
}

namespace {

// After a fork only the forking thread exists, and a thread pool that is waited for would never
// answer.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Lengths to one part in eight: a plan hardly depends on them, and asking for one takes longer than
// a small batch does.
int64_t about(int64_t n) {
  int64_t step = 1;
  while (n / step >= 16) step *= 2;
  return n / step * step;
}

int available_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

const Choice& choose(const CellFacts& cell, const Problem& exact) {
  Problem p = exact;
  p.steps = about(p.steps);
  p.rows = about(p.rows);
  thread_local std::map<PlanKey, Choice> known;
  thread_local int64_t epoch = 0;
  const int threads = available_threads();
  if (epoch != plans_epoch || known.size() >= kMostPlans) {
    known.clear();
    epoch = plans_epoch;
  }
  const PlanKey key{&cell,   p.steps,  p.batch, p.rows,     p.inputs,    p.hidden, p.lanes,
                    p.dtype, p.device, p.tape,  p.backward, p.projected, p.frozen, threads};
  auto found = known.find(key);
  if (found != known.end()) return found->second;
  py::gil_scoped_acquire gil;
  auto answer = python().plan(
      py::arg("cell") = cell.name, py::arg("steps") = p.steps, py::arg("batch") = p.batch,
      py::arg("rows") = p.rows, py::arg("inputs") = p.inputs, py::arg("hidden") = p.hidden,
      py::arg("gates") = cell.gates, py::arg("states") = cell.states, py::arg("lanes") = p.lanes,
      py::arg("dtype") = c10::toString(p.dtype),
      py::arg("device") = c10::DeviceTypeName(p.device, /*lower_case=*/true),
      py::arg("tape") = p.tape, py::arg("backward") = p.backward,
      py::arg("projected") = p.projected, py::arg("frozen") = p.frozen,
      py::arg("projectable") = cell.projectable,
      py::arg("compiled") = cell.compiled[p.dtype == at::kDouble] != nullptr,
      py::arg("threads") = threads);
  auto [kernel, packed, lanes, slots, units, chunk_rows] =
      answer.cast<std::tuple<std::string, bool, int32_t, int32_t, int32_t, int64_t>>();
  return known.emplace(key, Choice{kernel, {packed, lanes, slots, units, chunk_rows}})
      .first->second;
}

void forget_plans() { ++plans_epoch; }

ScanOutputs python_forward(const std::string& kernel, const ScanInputs& in, bool tape) {
  py::gil_scoped_acquire gil;
  return python().forward(kernel, inputs_to_python(in), tape).cast<ScanOutputs>();
}

std::vector<Tensor> python_backward(const std::string& kernel, const ScanInputs& in,
                                    const Incoming& grads, const Tensor& y, const Tensor& tape,
                                    const Needs& needs) {
  WithAutograd autograd;
  py::gil_scoped_acquire gil;
  return python()
      .backward(kernel, inputs_to_python(in), incoming_to_python(grads), y, tape, needs)
      .cast<std::vector<Tensor>>();
}

std::vector<Tensor> python_differentiable_backward(const ScanInputs& in, const Incoming& grads,
                                                   const Needs& needs) {
  py::gil_scoped_acquire gil;
  return python()
      .differentiable_backward(inputs_to_python(in), incoming_to_python(grads), needs)
      .cast<std::vector<Tensor>>();
}

std::vector<Tensor> Gradients::flat(const Needs& needs) const {
  std::vector<Tensor> all;
  if (needs[kNeedX]) all.push_back(x);
  for (const auto* group : {&w_ih, &w_hh, &b_ih, &b_hh, &w_hr, &s0})
    all.insert(all.end(), group->begin(), group->end());
  return all;
}

namespace {

#define FASTRNN_SCAN_PARAMETERS                                                     \
  std::string_view cell, const Tensor &x, TensorList w_ih, TensorList w_hh,         \
      const OptionalList &b_ih, const OptionalList &b_hh, const OptionalList &w_hr, \
      const OptionalList &s0, const std::optional<Tensor>&batch_sizes,              \
      const std::optional<Tensor>&lengths, const std::optional<Tensor>&resets, int64_t reverse
#define FASTRNN_SCAN_INPUTS                                                            \
  ScanInputs {                                                                         \
    cell, x, w_ih, w_hh, or_empty(b_ih), or_empty(b_hh), or_empty(w_hr), or_empty(s0), \
        batch_sizes, lengths, resets, reverse                                          \
  }
#define FASTRNN_PACKED_PARAMETERS FASTRNN_SCAN_PARAMETERS, TensorList packed, const Tensor &expected

ScanOutputs from_list(std::vector<Tensor> list) {
  ScanOutputs out;
  auto& [y, states, tape] = out;
  y = std::move(list.front());
  tape = std::move(list.back());
  states.assign(std::make_move_iterator(list.begin() + 1), std::make_move_iterator(list.end() - 1));
  return out;
}

}  // namespace

ScanOutputs call_scan(const ScanInputs& in, bool tape, bool recompute) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastrnn::scan", "")
                       .typed<std::vector<Tensor>(FASTRNN_SCAN_PARAMETERS, bool, bool)>();
  return from_list(op.call(in.cell, in.x, in.w_ih, in.w_hh, or_none(in.b_ih), or_none(in.b_hh),
                           or_none(in.w_hr), or_none(in.s0), in.batch_sizes, in.lengths, in.resets,
                           in.reverse, tape, recompute));
}

namespace {

// `recompute` is for autograd, which stands before these.
std::vector<Tensor> cpu(FASTRNN_SCAN_PARAMETERS, bool tape, bool) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  // Of x and weights made in inference mode the dispatcher knows no autograd, and it does not look
  // at the others.
  if (x.is_inference() && at::GradMode::is_enabled() &&
      !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCPU))
    for (TensorList list : {in.b_ih, in.b_hh, in.w_hr, in.s0})
      for (const Tensor& each : list)
        TORCH_CHECK(!each.requires_grad(),
                    "scan: a bias or state requires gradients, but x and the weights are inference "
                    "tensors, which cannot be saved for backward; clone them outside "
                    "torch.inference_mode()");
  return as_list(scan_cpu(in, tape));
}

// A frozen layer: the weights are there for their sizes, and for kernels other than the CPU's.
ScanOutputs scan_frozen(const ScanInputs& in, const Tensor& expected) {
  c10::SmallVector<Tensor, 4> weights;
  for (TensorList list : {in.w_ih, in.w_hh, in.b_ih, in.b_hh, in.w_hr})
    weights.insert(weights.end(), list.begin(), list.end());
  TORCH_CHECK(
      unchanged(weights, expected, in.x.numel() / std::max<int64_t>(in.x.size(-1), 1)),
      "fastrnn: the weights of a frozen layer were changed or replaced after freezing. Call "
      "fastrnn.freeze(module) again to take the new ones over, or fastrnn.unfreeze(module) "
      "before changing them");
  ScanOutputs out = scan_cpu(in, false);
  std::get<2>(out).reset();
  return out;
}

std::vector<Tensor> cpu_packed(FASTRNN_PACKED_PARAMETERS) {
  ScanInputs in = FASTRNN_SCAN_INPUTS;
  in.packed = packed;
  return as_list(scan_frozen(in, expected));
}

// Devices and dtypes without a kernel of their own in C++.
std::string kernel_elsewhere(const ScanInputs& in, bool tape, bool backward) {
  const CellFacts& facts = known_cell(in.cell, in.x.device().type(), in.x.scalar_type());
  const Tensor& x = in.x;
  const int64_t steps = x.dim() == 3 ? x.size(0) : 1, batch = x.size(-2);
  return choose(facts,
                {in.cell, steps, batch, steps * batch, x.size(-1), in.w_hh[0].size(0) / facts.gates,
                 static_cast<int64_t>(in.w_hh.size()), x.scalar_type(), x.device().type(), tape,
                 backward, !in.w_hr.empty(), false})
      .kernel;
}

std::vector<Tensor> elsewhere(FASTRNN_SCAN_PARAMETERS, bool tape, bool) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  return as_list(python_forward(kernel_elsewhere(in, tape, false), in, tape));
}

Incoming incoming(const std::optional<Tensor>& dy,
                  const c10::List<std::optional<Tensor>>& dstates) {
  Incoming grads;
  if (dy) grads.dy = *dy;
  for (std::optional<Tensor> each : dstates) grads.dstates.push_back(each ? *each : Tensor());
  return grads;
}

#define FASTRNN_BACKWARD_PARAMETERS                                                              \
  std::string_view cell, const std::optional<Tensor>&dy,                                         \
      const c10::List<std::optional<Tensor>>&dstates, const Tensor &x, TensorList w_ih,          \
      TensorList w_hh, const OptionalList &b_ih, const OptionalList &b_hh,                       \
      const OptionalList &w_hr, const OptionalList &s0, const std::optional<Tensor>&batch_sizes, \
      const std::optional<Tensor>&lengths, const std::optional<Tensor>&resets, int64_t reverse,  \
      const Tensor &y, const Tensor &tape, Needs needs

std::vector<Tensor> backward_cpu(FASTRNN_BACKWARD_PARAMETERS) {
  return scan_backward_cpu(FASTRNN_SCAN_INPUTS, incoming(dy, dstates), y, tape, needs);
}

std::vector<Tensor> backward_elsewhere(FASTRNN_BACKWARD_PARAMETERS) {
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  return python_backward(kernel_elsewhere(in, true, true), in, incoming(dy, dstates), y, tape,
                         needs);
}

// The op as torch.ops calls it, but for a third of the time that takes to convert the arguments.
std::pair<Tensor, std::vector<Tensor>> scan_from_python(
    const std::string& cell, const Tensor& x, const std::vector<Tensor>& w_ih,
    const std::vector<Tensor>& w_hh, const std::vector<Tensor>& b_ih,
    const std::vector<Tensor>& b_hh, const std::vector<Tensor>& w_hr, const std::vector<Tensor>& s0,
    const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& resets, int64_t reverse, bool recompute) {
  auto [y, states, tape] =
      call_scan({cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, s0, batch_sizes, lengths, resets, reverse},
                false, recompute);
  return {y, states};
}

// A tensor that nothing looks into on its way: of torch's own class, dense, on a CPU.
const Tensor* plain_tensor(py::handle object, at::IntArrayRef size, at::ScalarType dtype) {
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(THPVariableClass) &&
      Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(ParameterClass))
    return nullptr;
  const Tensor& t = THPVariable_Unpack(object.ptr());
  const bool fits = t.layout() == at::kStrided && t.is_cpu() && !t.is_nested() &&
                    t.scalar_type() == dtype && t.sizes() == size;
  return fits ? &t : nullptr;
}

// Whether a caller asks for gradients that a frozen layer does not have.
bool wants_gradients(const ScanInputs& in) {
  if (!at::GradMode::is_enabled()) return false;
  bool wanted = in.x.requires_grad();
  for (TensorList list : {in.w_ih, in.w_hh, in.b_ih, in.b_hh, in.s0})
    for (const Tensor& each : list) wanted |= each.requires_grad();
  return wanted;
}

std::vector<Tensor> call_packed(const ScanInputs& in, const Tensor& expected) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fastrnn::scan_packed", "")
                       .typed<std::vector<Tensor>(FASTRNN_PACKED_PARAMETERS)>();
  return op.call(in.cell, in.x, in.w_ih, in.w_hh, or_none(in.b_ih), or_none(in.b_hh),
                 or_none(in.w_hr), or_none(in.s0), in.batch_sizes, in.lengths, in.resets,
                 in.reverse, in.packed, expected);
}

// One step of a cell on x [B, I] and states [B, H], with weights w_ih, w_hh, b_ih, b_hh and, of a
// frozen cell, what pack() made of them: the tuple of next states; the views and checks of Python
// take longer than a small cell. None where anything asks for a closer look.
py::object step_from_python(const std::string& cell, py::handle input, py::tuple before,
                            py::tuple weights, const std::optional<std::vector<Tensor>>& packed,
                            const std::optional<Tensor>& expected) {
  const CellFacts* facts = find_cell(cell);
  if (!facts || at::impl::torch_function_mode_enabled() ||
      at::autocast::is_autocast_enabled(at::kCPU) || !THPVariable_Check(input.ptr()) ||
      !THPVariable_Check(weights[1].ptr()))
    return py::none();
  const Tensor &like = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weights[1].ptr());
  if (like.dim() != 2 || w.dim() != 2) return py::none();
  const int64_t B = like.size(0), I = like.size(1), H = w.size(1), rows = facts->gates * H;
  const auto dtype = like.scalar_type();
  const Tensor* x = plain_tensor(input, {B, I}, dtype);
  const Tensor* w_ih = plain_tensor(weights[0], {rows, I}, dtype);
  const Tensor* w_hh = plain_tensor(weights[1], {rows, H}, dtype);
  const bool biased = !weights[2].is_none();
  const Tensor* b_ih = biased ? plain_tensor(weights[2], {rows}, dtype) : nullptr;
  const Tensor* b_hh = biased ? plain_tensor(weights[3], {rows}, dtype) : nullptr;
  if (!x || !w_ih || !w_hh || (biased ? !b_ih || !b_hh : !weights[3].is_none())) return py::none();
  if (!before.empty() && static_cast<int32_t>(before.size()) != facts->states) return py::none();
  std::array<Tensor, kMaxStates> s0;
  for (size_t s = 0; s < before.size(); ++s) {
    const Tensor* state = plain_tensor(before[s], {B, H}, dtype);
    if (!state) return py::none();
    s0[s] = *state;
  }
  const TensorList none;
  const std::optional<Tensor> absent;
  ScanInputs in{cell,
                *x,
                *w_ih,
                *w_hh,
                biased ? TensorList(*b_ih) : none,
                biased ? TensorList(*b_hh) : none,
                none,
                TensorList(s0.data(), before.size()),
                absent,
                absent,
                absent,
                0};
  if (packed) in.packed = *packed;
  if (packed && (wants_gradients(in) || c10::impl::TorchDispatchModeTLS::any_modes_set()))
    return py::none();
  std::vector<Tensor> states;
  Tensor y;
  {
    py::gil_scoped_release release;
    std::tie(y, states, std::ignore) = packed ? scan_frozen(in, *expected) : call_scan(in, false);
  }
  py::tuple after(states.size());
  after[0] = std::move(y);
  for (size_t s = 1; s < states.size(); ++s) after[s] = std::move(states[s]);
  return after;
}

std::pair<Tensor, std::vector<Tensor>> packed_from_python(
    const std::string& cell, const Tensor& x, const std::vector<Tensor>& w_ih,
    const std::vector<Tensor>& w_hh, const std::vector<Tensor>& b_ih,
    const std::vector<Tensor>& b_hh, const std::vector<Tensor>& w_hr, const std::vector<Tensor>& s0,
    const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& resets, int64_t reverse, const std::vector<Tensor>& packed,
    const Tensor& expected) {
  std::vector<Tensor> list = call_packed(
      {cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, s0, batch_sizes, lengths, resets, reverse, packed},
      expected);
  Tensor y = std::move(list.front());
  list.erase(list.begin());
  return {std::move(y), std::move(list)};
}

// Under autocast all operands take its dtype, as in torch.nn, whose GRU on CPUs alone computes in
// the dtype of its state.
template <c10::DeviceType device, c10::DispatchKey key>
std::vector<Tensor> autocast(FASTRNN_SCAN_PARAMETERS, bool tape, bool recompute) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  if (device == c10::DeviceType::CPU && cell == "gru" &&
      (in.s0.empty() ? x : in.s0[0]).scalar_type() == at::kFloat)
    type = at::kFloat;
  auto cast = [&](const Tensor& each) { return at::autocast::cached_cast(type, each, device); };
  auto cast_all = [&](TensorList list) {
    std::vector<Tensor> out;
    for (const Tensor& each : list) out.push_back(cast(each));
    return out;
  };
  const auto ih = cast_all(in.w_ih), hh = cast_all(in.w_hh), bi = cast_all(in.b_ih),
             bh = cast_all(in.b_hh), hr = cast_all(in.w_hr), s = cast_all(in.s0);
  const Tensor cast_x = cast(x);
  return as_list(
      call_scan({cell, cast_x, ih, hh, bi, bh, hr, s, batch_sizes, lengths, resets, reverse}, tape,
                recompute));
}

}  // namespace

TORCH_LIBRARY(fastrnn, m) {
  // fastrnn/reference.py documents the arguments. Gives y, the S states and the tape, which is
  // what scan_backward needs and has no rows unless `tape` asks for it. With `recompute` autograd
  // keeps no tape, and gives scan_backward one without rows. Lists that may be empty are optional,
  // since ahead-of-time compiled programs pass an empty list as none.
  m.def(
      "scan(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, "
      "Tensor[]? w_hr, Tensor[]? s0, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
      "int reverse, bool tape=False, bool recompute=False) -> Tensor[]");
  // Gives y and the states, by weights that pack() packed; `expected` is what fingerprint() said of
  // them then: a tensor, as a number would be a constant of a traced graph.
  m.def(
      "scan_packed(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, "
      "Tensor[]? b_hh, Tensor[]? w_hr, Tensor[]? s0, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, int reverse, Tensor[] packed, Tensor expected) -> Tensor[]");
  // Gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr, s0; `needs` picks x, w_ih, w_hh, biases, w_hr,
  // s0.
  m.def(
      "scan_backward(str cell, Tensor? dy, Tensor?[] dstates, Tensor x, Tensor[] w_ih, "
      "Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, Tensor[]? w_hr, Tensor[]? s0, "
      "Tensor? batch_sizes, Tensor? lengths, Tensor? resets, int reverse, Tensor y, Tensor tape, "
      "bool[6] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("scan", cpu);
  m.impl("scan_packed", cpu_packed);
  m.impl("scan_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("scan", elsewhere);
  m.impl("scan_backward", backward_elsewhere);
}

// Who asks for gradients has been refused; torch's own fallback would look again, slowly.
TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("scan_packed", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) {
  m.impl("scan", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) {
  m.impl("scan", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

void bind_stepper(py::module_& m);  // stepper_binding.cpp

PYBIND11_MODULE(_C, m) {
  bind_stepper(m);
  m.def("scan", scan_from_python, py::call_guard<py::gil_scoped_release>(),
        "torch.ops.fastrnn.scan without its tape.");
  m.def("step", step_from_python, "One step of a cell on plain tensors; None for others.",
        py::arg("cell"), py::arg("input"), py::arg("before"), py::arg("weights"),
        py::arg("packed") = std::nullopt, py::arg("expected") = std::nullopt);
  m.def("transposed", transposed, py::call_guard<py::gil_scoped_release>(),
        "`y.transpose(0, 1)` that is no view to autograd.");
  m.def("scan_packed", packed_from_python, py::call_guard<py::gil_scoped_release>());
  m.def("pack", pack, py::call_guard<py::gil_scoped_release>(), py::arg("cell"), py::arg("w_ih"),
        py::arg("w_hh"), py::arg("b_ih") = std::nullopt, py::arg("b_hh") = std::nullopt,
        py::arg("w_hr") = std::nullopt);
  m.def(
      "fingerprint", [](const std::vector<Tensor>& tensors) { return fingerprint(tensors); },
      "What scan_packed expects of its weights.");
  m.attr("built_for") = FASTRNN_TORCH_VERSION;
  m.def("isas", compiled_isas, "Instruction sets compiled in that this machine has, best last.");
  m.def("isa", isa_in_use);
  m.def("vector_bytes", vector_bytes);
  m.def("forget_plans", forget_plans);
  m.def("add_cell_facts", add_cell_facts, py::arg("name"), py::arg("gates"), py::arg("states"),
        py::arg("kept"), py::arg("tied"), py::arg("projectable"),
        "Makes a cell known without code for CPUs, which load_cells may add.");
  m.def(
      "has_code",
      [](const std::string& name, bool in_double) {
        const CellFacts* cell = find_cell(name);
        return cell && cell->compiled[in_double];
      },
      py::arg("name"), py::arg("in_double") = false,
      "Whether a cell is known and has code for CPUs that computes in float, or in double.");
  m.def(
      "load_cells",
      [](const std::string& path, const std::string& symbol) {
        load_cells(path, symbol);
        forget_plans();  // of cells that were known without code
      },
      py::arg("path"), py::arg("symbol"));
  m.def(
      "cell_facts",
      [](const std::string& name) -> py::object {
        const CellFacts* cell = find_cell(name);
        if (!cell) return py::none();
        return py::make_tuple(cell->gates, cell->states, cell->kept);
      },
      "(gates, states, kept values) of a cell, or None.");
  m.def("set_callbacks", [](py::object plan, py::object find, py::object forward,
                            py::object backward, py::object differentiable_backward) {
    callbacks = new Callbacks{plan, find, forward, backward, differentiable_backward};
  });
}

}  // namespace fastrnn
