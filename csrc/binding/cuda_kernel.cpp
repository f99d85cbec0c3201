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

using Shape = std::tuple<std::string, int64_t, int64_t, int64_t, int64_t, at::ScalarType,
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

Shape shape_of(const ScanInputs& in) {
  const Tensor& x = in.x;
  return {std::string(in.cell),
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
  if (x.dim() != 3 || in.w_hh.size() != 1 || x.numel() == 0) return false;
  if (x.scalar_type() == at::kFloat && !tf32_allowed()) return false;
  if (in.batch_sizes || in.lengths || in.resets || in.noise) return false;
  if (!in.w_hr.empty() || !in.params.empty() || !in.reset_states.empty()) return false;
  if (cell.input_gates != cell.gates || cell.recurrent_gates != cell.gates) return false;
  const int64_t H = in.w_hh[0].size(-1), of_gates = cell.gates * H;
  if (!is(in.w_ih[0], x, {of_gates, x.size(2)}) || !is(in.w_hh[0], x, {of_gates, H})) return false;
  if (in.b_ih.size() != in.b_hh.size()) return false;
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

// The tensor, or a copy of it that vectors can read.
Tensor aligned(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % 16 ? whole.clone() : whole;
}

}  // namespace

bool keep_launch(const ScanInputs& in, const CudaLaunch& launch) {
  const CellFacts* cell = find_cell(std::string(in.cell));
  if (!cell || !launches_here(*cell, in) || !current_stream(in.x.device())) return false;
  Launches& all = launches();
  std::unique_lock lock(all.mutex);
  if (all.epoch != plans_forgotten() || all.of.size() >= kMostShapes) all.of.clear();
  all.epoch = plans_forgotten();
  all.of.insert_or_assign(shape_of(in), launch);
  return true;
}

std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in) {
  const CellFacts* cell = find_cell(std::string(in.cell));
  if (!cell || !launches_here(*cell, in)) return std::nullopt;
  CudaLaunch launch;
  {
    Launches& all = launches();
    std::shared_lock lock(all.mutex);
    if (all.of.empty() || all.epoch != plans_forgotten()) return std::nullopt;
    const auto found = all.of.find(shape_of(in));
    if (found == all.of.end()) return std::nullopt;
    launch = found->second;
  }
  const Tensor& x = in.x;
  const int64_t T = x.size(0), B = x.size(1), H = in.w_hh[0].size(1), S = cell->states;
  const auto stored = x.options();
  const auto of_sums = stored.dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const c10::DeviceGuard on_device(x.device());

  const Tensor y = at::empty({T, B, H}, stored);
  Tensor carry = at::zeros({S + 1, 1, B, H}, of_sums);
  for (size_t s = 0; s < in.s0.size(); ++s) carry.select(0, s).copy_(in.s0[s]);
  auto [of_u, of_v] = biases(*cell, in, H);
  const Tensor u = aligned(at::linear(x, in.w_ih[0], of_u));
  const Tensor w_hh = aligned(in.w_hh[0]);
  if (of_v.defined()) of_v = aligned(of_v);

  Sweep sweep;
  sweep.steps = sweep.end = T;
  sweep.batch = B;
  sweep.hidden = H;
  sweep.recurrences = 1;
  sweep.chunk_rows = T * B;
  sweep.reverse = static_cast<uint64_t>(in.reverse);
  sweep.w_hh = w_hh.data_ptr();
  sweep.u = u.data_ptr();
  sweep.b_hh = of_v.defined() ? of_v.data_ptr() : nullptr;
  sweep.carry = carry.data_ptr();
  sweep.y = y.data_ptr();
  Tensor workspace;
  if (launch.workspace > 0) {
    workspace = at::empty({launch.workspace}, stored.dtype(at::kByte));
    sweep.workspace = workspace.data_ptr();
  }
  const auto stream = current_stream(x.device());
  if (const int error = launch.forward(cell->name.c_str(), &sweep, &launch.plan, *stream)) {
    if (error == kTooLarge) return std::nullopt;  // Python plans again, without grids
    const char* text = launch.error(error);
    TORCH_CHECK(false, "the CUDA kernels of fastrnn failed: ", text ? text : "no text", " (error ",
                error, ")");
  }
  // Copies, so that the states neither share memory nor keep it alive.
  std::vector<Tensor> states;
  for (int64_t s = 0; s < S; ++s)
    states.push_back(carry.select(0, s).to(stored, /*non_blocking=*/false, /*copy=*/true));
  const int64_t ratio = x.element_size() == 2 ? 2 : 1;
  return ScanOutputs{y, std::move(states),
                     at::empty({0, 1, cell->tape_width(false, H, ratio), H}, stored)};
}

}  // namespace fastrnn
