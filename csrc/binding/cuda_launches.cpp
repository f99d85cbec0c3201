#include "binding/cuda_launches.h"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/DimVector.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>

#include "binding/plan_cache.h"

namespace fastrnn {
namespace {

constexpr size_t kMostShapes = 4096;  // batches of ever new sizes must not fill memory

// What a plan goes by, besides the number of steps.
using Shape = std::tuple<const CellFacts*, bool, int64_t, int64_t, int64_t, at::ScalarType,
                         c10::DeviceType, c10::DeviceIndex, int64_t, bool>;

struct Launches {
  std::shared_mutex mutex;
  std::map<Shape, std::vector<CudaLaunch>> of;
  std::atomic<int64_t> epoch = -1;  // plans_forgotten() when these were planned; -1: there are none

  bool are_current() const { return epoch == plans_forgotten(); }
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

Shape shape_of(const CellFacts& cell, const ScanInputs& in, int64_t batch, bool backward) {
  const Tensor& x = in.x;
  return {&cell,
          backward,
          batch,
          in.w_hh[0].size(1),
          in.w_hh.size(),
          x.scalar_type(),
          x.device().type(),
          x.device().index(),
          in.reverse,
          x.scalar_type() == at::kFloat && *tf32_allowed()};
}

// Whether C++ launches calls of this kind. The others are Python's.
bool launchable(const CellFacts& cell, const ScanInputs& in) {
  if (in.x.scalar_type() == at::kFloat && !tf32_allowed()) return false;
  if (in.lengths || in.noise || cell.draws > 0) return false;
  if (in.batch_sizes && !in.batch_sizes->is_contiguous()) return false;
  if (!in.w_hr.empty() || !in.params.empty() || !in.reset_states.empty()) return false;
  return cell.input_gates == cell.gates && cell.recurrent_gates == cell.gates;
}

bool is(const Tensor& tensor, const Tensor& x, at::IntArrayRef size) {
  return tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type() &&
         tensor.sizes() == size;
}

// Whether the operands of a launchable call fit together.
bool fit(const CellFacts& cell, const ScanInputs& in) {
  const Tensor& x = in.x;
  const int64_t P = in.w_hh.size();
  if (x.numel() == 0 || P < 1 || P > kMostRecurrences) return false;
  const int64_t H = in.w_hh[0].size(-1), of_gates = cell.gates * H;
  const auto all = [&](TensorList tensors, at::IntArrayRef size, int64_t count) {
    return static_cast<int64_t>(tensors.size()) == count &&
           std::all_of(tensors.begin(), tensors.end(),
                       [&](const Tensor& tensor) { return is(tensor, x, size); });
  };
  if (!all(in.w_ih, {of_gates, x.size(-1)}, P) || !all(in.w_hh, {of_gates, H}, P)) return false;
  const int64_t biased = in.b_ih.empty() ? 0 : P;
  if (!all(in.b_ih, {of_gates}, biased) || !all(in.b_hh, {of_gates}, biased)) return false;
  if (in.batch_sizes) {
    const Tensor& sizes = *in.batch_sizes;
    if (x.dim() != 2 || sizes.dim() != 1 || !sizes.is_cpu()) return false;
    if (sizes.scalar_type() != at::kLong || in.s0.empty() || in.s0[0].dim() != 3) return false;
  }
  if (one_step(in) ? P != 1 : !in.batch_sizes && x.dim() != 3) return false;
  c10::DimVector of_state{P, batch_in(in), H};
  if (one_step(in)) of_state.erase(of_state.begin());
  if (!all(in.s0, of_state, in.s0.empty() ? 0 : cell.states)) return false;
  return !in.resets ||
         (in.resets->device() == x.device() && in.resets->scalar_type() == at::kBool &&
          in.resets->sizes() == x.sizes().slice(0, x.dim() - 1));
}

// The launch of a launchable call whose operands fit.
std::optional<CudaLaunch> found(const Shape& shape, int64_t steps) {
  Launches& all = launches();
  std::shared_lock lock(all.mutex);
  const auto known = all.of.find(shape);
  if (!all.are_current() || known == all.of.end()) return std::nullopt;
  for (const CudaLaunch& each : known->second)
    if (each.least_steps <= steps && steps <= each.most_steps) return each;
  return std::nullopt;
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

}  // namespace

int64_t steps_in(const ScanInputs& in) {
  return in.batch_sizes ? in.batch_sizes->size(0) : in.x.dim() == 3 ? in.x.size(0) : 1;
}

int64_t batch_in(const ScanInputs& in) { return in.batch_sizes ? in.s0[0].size(1) : in.x.size(-2); }

std::optional<void*> current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;  // the simulator of the tests
  return raw(c10::impl::VirtualGuardImpl(device.type()).getStream(device), 0);
}

bool keep_launch(const ScanInputs& in, bool backward, const CudaLaunch& launch) {
  const CellFacts* cell = find_cell(std::string(in.cell));
  if (!cell || !launchable(*cell, in) || !fit(*cell, in)) return false;
  if (!current_stream(in.x.device())) return false;
  Launches& all = launches();
  std::unique_lock lock(all.mutex);
  if (launch.epoch != plans_forgotten()) return false;  // another thread changed what plans go by
  if (!all.are_current() || all.of.size() >= kMostShapes) all.of.clear();
  all.epoch = launch.epoch;
  std::vector<CudaLaunch>& known = all.of[shape_of(*cell, in, batch_in(in), backward)];
  const auto same = [&](const CudaLaunch& each) { return each.least_steps == launch.least_steps; };
  known.erase(std::remove_if(known.begin(), known.end(), same), known.end());
  known.push_back(launch);
  return true;
}

std::optional<CudaLaunch> launch_of(const CellFacts& cell, const ScanInputs& in, bool backward) {
  if (!launches().are_current() || !launchable(cell, in) || !fit(cell, in)) return std::nullopt;
  return found(shape_of(cell, in, batch_in(in), backward), steps_in(in));
}

bool knows_launch(const CellFacts& cell, const ScanInputs& in, int64_t steps, int64_t batch) {
  return launches().are_current() && launchable(cell, in) &&
         found(shape_of(cell, in, batch, false), steps);
}

}  // namespace fastrnn
