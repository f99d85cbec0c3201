#include "binding/cuda_kernel.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/version.h>

#include <map>
#include <mutex>
#include <shared_mutex>

#include "binding/plan_cache.h"

namespace fastrnn {
namespace {

constexpr int kTooLarge = 720;        // cudaErrorCooperativeLaunchTooLarge
constexpr size_t kMostShapes = 4096;  // batches of ever new lengths must not fill memory

using Shape = std::tuple<Pass, std::string, int64_t, int64_t, int64_t, int64_t, at::ScalarType,
                         c10::DeviceType, c10::DeviceIndex, int64_t, bool>;

struct Launches {
  std::shared_mutex mutex;
  std::map<Shape, CudaLaunch> of;
  int64_t epoch = 0;
};

// Leaked on purpose: threads may launch while the process ends.
Launches& launches() {
  static auto* all = new Launches;
  return *all;
}

// Whether float32 is multiplied as TF32, by torch's switch for its own layers; nothing if this
// torch does not tell.
std::optional<bool> tf32_allowed() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
         at::Float32Precision::TF32;
#else
  return std::nullopt;
#endif
}

Shape shape_of(const ScanInputs& in, Pass pass) {
  const Tensor& x = in.x;
  return {pass,
          std::string(in.cell),
          x.size(0),
          x.size(1),
          x.size(2),
          in.w_hh[0].size(1),
          x.scalar_type(),
          x.device().type(),
          x.device().index(),
          in.reverse,
          x.scalar_type() == at::kFloat && *tf32_allowed()};
}

bool is(const Tensor& tensor, const Tensor& x, at::IntArrayRef size) {
  return tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type() &&
         tensor.sizes() == size;
}

// Whether C++ launches such calls. Those with wrong operands it leaves to Python, for its errors.
bool launches_here(const CellFacts& cell, const ScanInputs& in) {
  const Tensor& x = in.x;
  if (x.dim() != 3 || in.w_ih.size() != 1 || in.w_hh.size() != 1 || x.numel() == 0) return false;
  if (x.scalar_type() == at::kFloat && !tf32_allowed()) return false;
  if (in.batch_sizes || in.lengths || in.resets || in.noise) return false;
  if (!in.w_hr.empty() || !in.params.empty() || !in.reset_states.empty()) return false;
  if (cell.input_gates != cell.gates || cell.recurrent_gates != cell.gates) return false;
  const int64_t H = in.w_hh[0].size(-1), of_gates = cell.gates * H;
  if (!is(in.w_ih[0], x, {of_gates, x.size(2)}) || !is(in.w_hh[0], x, {of_gates, H})) return false;
  if (in.b_ih.size() != in.b_hh.size() || in.b_ih.size() > 1) return false;
  for (TensorList biases : {in.b_ih, in.b_hh})
    for (const Tensor& bias : biases)
      if (!is(bias, x, {of_gates})) return false;
  if (!in.s0.empty() && static_cast<int32_t>(in.s0.size()) != cell.states) return false;
  for (const Tensor& state : in.s0)
    if (!is(state, x, {1, x.size(1), H})) return false;
  return true;
}

// The raw stream. Some versions of torch do not tell; the overload for those gives nothing.
template <class Stream>
auto raw(const Stream& stream, int) -> std::optional<decltype(stream.native_handle())> {
  return stream.native_handle();
}
template <class Stream>
std::optional<void*> raw(const Stream&, long) {
  return std::nullopt;
}

std::optional<void*> current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;  // the simulator of the tests
  return raw(c10::impl::VirtualGuardImpl(device.type()).getStream(device), 0);
}

// u takes both biases of a gate whose projections are only ever added; the others of b_hh are the
// kernel's.
std::pair<Tensor, Tensor> biases(const CellFacts& cell, const ScanInputs& in, int64_t H) {
  if (in.b_ih.empty()) return {Tensor(), Tensor()};
  const Tensor &of_u = in.b_ih[0], &of_v = in.b_hh[0];
  if (cell.all_summed()) return {at::add(of_u, of_v), Tensor()};
  if (cell.summed == 0) return {of_u, of_v};
  Tensor both = of_u.clone();
  for (int64_t gate = 0; gate < cell.gates; ++gate) {
    int64_t end = gate;
    while (end < cell.gates && cell.summed >> end & 1) ++end;
    if (end == gate) continue;
    both.narrow(0, gate * H, (end - gate) * H).add_(of_v.narrow(0, gate * H, (end - gate) * H));
    gate = end;
  }
  return {both, of_v};
}

// A contiguous tensor that vectors can read: itself, or a copy.
Tensor aligned(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % 16 ? whole.clone() : whole;
}

const void* address(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

at::TensorOptions of_sums(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// A pass of a call: its sizes, and how Python launched such a pass.
class CudaCall {
 public:
  // Nothing, if that is not known here.
  static std::optional<CudaCall> of(const ScanInputs& in, Pass pass) {
    const CellFacts* cell = find_cell(std::string(in.cell));
    if (!cell || !launches_here(*cell, in)) return std::nullopt;
    Launches& all = launches();
    std::shared_lock lock(all.mutex);
    if (all.of.empty() || all.epoch != plans_forgotten()) return std::nullopt;
    const auto found = all.of.find(shape_of(in, pass));
    if (found == all.of.end()) return std::nullopt;
    return CudaCall(*cell, in, found->second);
  }

  // States, or gradients of states, [S, 1, B, H] and more, in the type of sums. Those that are
  // undefined or missing are zero.
  Tensor states(TensorList given, int64_t more = 0) const {
    Tensor all = at::zeros({S + more, 1, B, H}, of_sums(x));
    for (size_t s = 0; s < given.size(); ++s)
      if (given[s].defined()) all.select(0, s).copy_(given[s]);
    return all;
  }

  // A state as the caller has it. A copy, so that it neither shares memory nor keeps it alive.
  Tensor state(const Tensor& all, int64_t s) const {
    return all.select(0, s).to(x.options(), /*non_blocking=*/false, /*copy=*/true);
  }

  // Launches with these arrays; false if this device runs no grid, so that Python plans again.
  bool run(Sweep sweep) const {
    sweep.steps = sweep.end = T;
    sweep.batch = B;
    sweep.hidden = H;
    sweep.recurrences = 1;
    sweep.chunk_rows = T * B;
    sweep.reverse = reverse_;
    const Tensor weights = aligned(w_hh_);
    sweep.w_hh = weights.data_ptr();
    Tensor workspace;
    if (launch_.workspace > 0) {
      workspace = at::empty({launch_.workspace}, x.options().dtype(at::kByte));
      sweep.workspace = workspace.data_ptr();
    }
    const int error =
        launch_.run(cell.name.c_str(), &sweep, &launch_.plan, *current_stream(x.device()));
    if (error == kTooLarge) return false;
    const char* text = error ? launch_.error(error) : nullptr;
    TORCH_CHECK(!error, "the CUDA kernels of fastrnn failed: ", text ? text : "no text", " (error ",
                error, ")");
    return true;
  }

  const CellFacts& cell;
  const Tensor& x;
  const int64_t T, B, H, S;

 private:
  CudaCall(const CellFacts& cell, const ScanInputs& in, const CudaLaunch& launch)
      : cell(cell),
        x(in.x),
        T(x.size(0)),
        B(x.size(1)),
        H(in.w_hh[0].size(1)),
        S(cell.states),
        w_hh_(in.w_hh[0]),
        reverse_(static_cast<uint64_t>(in.reverse)),
        launch_(launch) {}

  const Tensor& w_hh_;
  const uint64_t reverse_;
  const CudaLaunch launch_;
};

}  // namespace

bool keep_launch(const ScanInputs& in, Pass pass, const CudaLaunch& launch) {
  const CellFacts* cell = find_cell(std::string(in.cell));
  if (!cell || !launches_here(*cell, in) || !current_stream(in.x.device())) return false;
  Launches& all = launches();
  std::unique_lock lock(all.mutex);
  if (launch.epoch != plans_forgotten()) return false;  // another thread changed what plans go by
  if (all.epoch != plans_forgotten() || all.of.size() >= kMostShapes) all.of.clear();
  all.epoch = launch.epoch;
  all.of.insert_or_assign(shape_of(in, pass), launch);
  return true;
}

std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in, bool tape) {
  const auto call = CudaCall::of(in, tape ? Pass::kForwardWithTape : Pass::kForward);
  if (!call) return std::nullopt;
  const Tensor& x = call->x;
  const int64_t T = call->T, B = call->B, H = call->H;
  const c10::DeviceGuard on_device(x.device());
  const Tensor y = at::empty({T, B, H}, x.options());
  const int64_t ratio = x.element_size() == 2 ? 2 : 1;
  const int64_t width = call->cell.tape_width(false, H, ratio);
  const Tensor saved = at::empty({tape ? T * B : 0, 1, width, H}, x.options());
  const Tensor carry = call->states(in.s0, 1);
  const auto [of_u, of_v] = biases(call->cell, in, H);
  const Tensor u = aligned(at::linear(x, in.w_ih[0], of_u));
  const Tensor b_hh = of_v.defined() ? aligned(of_v) : of_v;
  Sweep sweep;
  sweep.u = u.data_ptr();
  sweep.b_hh = address(b_hh);
  sweep.carry = carry.data_ptr();
  sweep.y = y.data_ptr();
  sweep.tape = tape ? saved.data_ptr() : nullptr;
  if (!call->run(sweep)) return std::nullopt;
  std::vector<Tensor> states;
  for (int64_t s = 0; s < call->S; ++s) states.push_back(call->state(carry, s));
  return ScanOutputs{y, std::move(states), saved};
}

std::optional<std::vector<Tensor>> backward_on_cuda(const ScanInputs& in, const OutputGrads& grads,
                                                    const Tensor& y, const Tensor& tape,
                                                    const Needs& needs) {
  if (grads.dsteps.defined()) return std::nullopt;
  const auto call = CudaCall::of(in, Pass::kBackward);
  if (!call) return std::nullopt;
  const Tensor& x = call->x;
  const int64_t rows = call->T * call->B, H = call->H, of_gates = call->cell.gates * H;
  if (tape.size(2) && tape.size(0) != rows) return std::nullopt;  // to be computed again
  const c10::DeviceGuard on_device(x.device());
  const Tensor dy = grads.dy.defined() ? aligned(grads.dy) : Tensor();
  const Tensor outputs = aligned(y), saved = aligned(tape);
  const Tensor s0 = call->states(in.s0), ds = call->states(grads.dstates);
  const Tensor dv = at::empty({rows, of_gates}, x.options());
  const Tensor du = call->cell.all_summed() ? dv : at::empty_like(dv);
  const Tensor h_prev = at::empty({rows, H}, x.options());
  Sweep sweep;
  sweep.dy = address(dy);
  sweep.y = outputs.data_ptr();
  sweep.tape = saved.data_ptr();
  sweep.s0 = s0.data_ptr();
  sweep.ds = ds.data_ptr();
  sweep.du = du.data_ptr();
  sweep.dv = dv.data_ptr();
  sweep.h_prev = h_prev.data_ptr();
  if (!call->run(sweep)) return std::nullopt;
  std::vector<Tensor> out;
  if (needs[kNeedX]) out.push_back(at::mm(du, in.w_ih[0]).view(x.sizes()));
  if (needs[kNeedWih]) out.push_back(at::mm(du.t(), x.reshape({rows, x.size(2)})));
  if (needs[kNeedWhh]) out.push_back(at::mm(dv.t(), h_prev));
  if (needs[kNeedBias] && !in.b_ih.empty()) {
    out.push_back(du.sum(0));
    out.push_back(call->cell.all_summed() ? out.back().clone() : dv.sum(0));
  }
  if (needs[kNeedStates])
    for (size_t s = 0; s < in.s0.size(); ++s) out.push_back(call->state(ds, s));
  return out;
}

}  // namespace fastrnn
