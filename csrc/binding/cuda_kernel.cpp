#include "binding/cuda_kernel.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <mutex>
#include <shared_mutex>

#include "binding/callbacks.h"
#include "binding/cuda_launches.h"

namespace fastrnn {
namespace {

constexpr int kTooLarge = 720;      // cudaErrorCooperativeLaunchTooLarge
constexpr size_t kMostTables = 32;  // packed batches that are remembered

// The tables of a packed batch, made and kept by kernels/gpu/packed.py, which calls on the stream
// of their copy to the device may read.
struct Tables {
  Tensor sizes;  // contiguous
  int64_t batch, rows;
  c10::Device device;
  void* stream;
  Tensor on_device;  // [T+1+B]: the first row of each step, then the steps of each sequence
};

struct KnownTables {
  std::shared_mutex mutex;
  std::vector<Tables> all;  // the newest last
};

// Leaked on purpose: threads may launch while the process ends.
KnownTables& known_tables() {
  static auto* known = new KnownTables;
  return *known;
}

// Whether these are sizes of a batch that holds so many rows: kernels read where they say.
bool sound(const int64_t* sizes, int64_t steps, int64_t batch, int64_t rows) {
  for (int64_t t = 0; t < steps; ++t) {
    if (sizes[t] < 1 || sizes[t] > (t ? sizes[t - 1] : batch)) return false;
    rows -= sizes[t];
  }
  return rows == 0;
}

// The tables of a packed batch for a call on this stream; undefined for a batch that is wrong.
Tensor tables_of(const ScanInputs& in, void* stream, bool capturing) {
  const Tensor& sizes = *in.batch_sizes;
  const int64_t batch = batch_in(in), rows = in.x.size(0);
  const c10::Device device = in.x.device();
  KnownTables& known = known_tables();
  // A capture needs tables that stay; Python keeps those.
  if (!capturing) {
    std::shared_lock lock(known.mutex);
    for (auto each = known.all.rbegin(); each != known.all.rend(); ++each)
      if (each->batch == batch && each->rows == rows && each->device == device &&
          each->stream == stream && each->sizes.size(0) == sizes.size(0) &&
          std::memcmp(each->sizes.const_data_ptr(), sizes.const_data_ptr(), sizes.nbytes()) == 0)
        return each->on_device;
  }
  if (!sound(sizes.const_data_ptr<int64_t>(), sizes.size(0), batch, rows)) return {};
  const auto [on_device, copied_on] = python_tables(sizes, batch, device);
  if (capturing || copied_on != stream) return on_device;
  std::unique_lock lock(known.mutex);
  if (known.all.size() >= kMostTables) known.all.erase(known.all.begin());
  known.all.push_back({sizes.clone(), batch, rows, device, stream, on_device});
  return on_device;
}

// Neighbouring recurrences in the same direction.
struct Run {
  int64_t begin, count;
};

std::vector<Run> runs_of(int64_t reverse, int64_t P) {
  std::vector<Run> runs;
  for (int64_t p = 0; p < P; ++p) {
    if (p > 0 && (reverse >> p & 1) == (reverse >> (p - 1) & 1))
      ++runs.back().count;
    else
      runs.push_back({p, 1});
  }
  return runs;
}

// A contiguous tensor that vectors can read: itself, or a copy.
Tensor aligned(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % 16 ? whole.clone() : whole;
}

// Contiguous, with a first dimension of recurrences if there are several.
Tensor stacked(TensorList tensors) {
  return tensors.size() == 1 ? aligned(tensors[0]) : at::stack(tensors);
}

// What u takes of the biases of a recurrence: both for a gate whose projections are only ever
// added. The others of b_hh are the kernel's.
Tensor bias_of_u(const CellFacts& cell, const ScanInputs& in, int64_t p, int64_t H) {
  const Tensor &of_u = in.b_ih[p], &of_v = in.b_hh[p];
  if (cell.all_summed()) return at::add(of_u, of_v);
  if (cell.summed == 0) return of_u;
  Tensor both = of_u.clone();
  for (int64_t gate = 0; gate < cell.gates; ++gate) {
    int64_t end = gate;
    while (end < cell.gates && cell.summed >> end & 1) ++end;
    if (end == gate) continue;
    both.narrow(0, gate * H, (end - gate) * H).add_(of_v.narrow(0, gate * H, (end - gate) * H));
    gate = end;
  }
  return both;
}

const void* address(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// Tensors of states that kernels read; those that are undefined or missing are zero.
class GivenStates {
 public:
  GivenStates(TensorList given, const void* (&to)[kMostStates]) {
    for (size_t s = 0; s < given.size(); ++s) {
      if (!given[s].defined()) continue;
      kept_.push_back(aligned(given[s]));
      to[s] = kept_.back().data_ptr();
    }
  }

 private:
  c10::SmallVector<Tensor, 2> kept_;
};

void receive(const std::vector<Tensor>& states, void* (&to)[kMostStates]) {
  for (size_t s = 0; s < states.size(); ++s) to[s] = states[s].data_ptr();
}

// A pass of a call: its sizes, and how Python launched such a pass.
class CudaCall {
 public:
  // Nothing, if that is not known here.
  static std::optional<CudaCall> of(const ScanInputs& in, bool backward) {
    const CellFacts* cell = find_cell(std::string(in.cell));
    if (!cell) return std::nullopt;
    const auto launch = launch_of(*cell, in, backward);
    if (!launch) return std::nullopt;
    CudaCall call(*cell, in, *launch);
    if (!in.batch_sizes) return call;
    call.tables_ = tables_of(in, call.stream_, launch->capturing(call.stream_) != 0);
    if (!call.tables_.defined()) return std::nullopt;
    return call;
  }

  // States, or gradients of states, for kernels to write.
  std::vector<Tensor> new_states() const {
    std::vector<Tensor> all;
    for (int64_t s = 0; s < S; ++s)
      all.push_back(one_step(in) ? at::empty({B, H}, x.options())
                                 : at::empty({P, B, H}, x.options()));
    return all;
  }

  // What kernels with a launch for each step keep between these: so many states, in the type of
  // sums. The others need none.
  Tensor between_steps(int64_t states) const {
    if (launch_.plan.residency != kStep) return {};
    const bool wide = x.scalar_type() == at::kDouble;
    return at::empty({states, P, B, H}, x.options().dtype(wide ? at::kDouble : at::kFloat));
  }

  // One row for each row of the output, for every recurrence, [P, rows, width]; without the first
  // dimension for one.
  Tensor rows_of(int64_t width) const {
    if (P == 1) return at::empty({rows, width}, x.options());
    return at::empty({P, rows, width}, x.options());
  }

  // Launches with these arrays; false if this device runs no grid, so that Python plans again.
  bool run(Sweep sweep) const {
    sweep.steps = sweep.end = T;
    sweep.batch = B;
    sweep.hidden = H;
    sweep.recurrences = P;
    sweep.chunk_rows = rows;
    sweep.reverse = static_cast<uint64_t>(in.reverse);
    const Tensor weights = stacked(in.w_hh);
    sweep.w_hh = weights.data_ptr();
    if (tables_.defined()) {
      sweep.first = tables_.const_data_ptr<int64_t>();
      sweep.length = sweep.first + T + 1;
    }
    Tensor resets, workspace;
    if (in.resets) {
      resets = aligned(*in.resets);
      sweep.resets = static_cast<const uint8_t*>(resets.data_ptr());
    }
    if (launch_.workspace > 0) {
      workspace = at::empty({launch_.workspace}, x.options().dtype(at::kByte));
      sweep.workspace = workspace.data_ptr();
    }
    const int error = launch_.run(cell.name.c_str(), &sweep, &launch_.plan, stream_);
    if (error == kTooLarge) return false;
    const char* text = error ? launch_.error(error) : nullptr;
    TORCH_CHECK(!error, "the CUDA kernels of fastrnn failed: ", text ? text : "no text", " (error ",
                error, ")");
    return true;
  }

  const CellFacts& cell;
  const ScanInputs& in;
  const Tensor& x;
  const int64_t T, B, H, S, P, rows;

 private:
  CudaCall(const CellFacts& cell, const ScanInputs& in, const CudaLaunch& launch)
      : cell(cell),
        in(in),
        x(in.x),
        T(steps_in(in)),
        B(batch_in(in)),
        H(in.w_hh[0].size(1)),
        S(cell.states),
        P(in.w_hh.size()),
        rows(x.numel() / x.size(-1)),
        launch_(launch),
        stream_(*current_stream(x.device())) {}

  const CudaLaunch launch_;
  void* const stream_;
  Tensor tables_;
};

// u of every recurrence, with its biases.
Tensor projected(const CudaCall& call) {
  const ScanInputs& in = call.in;
  const bool biased = !in.b_ih.empty();
  const auto bias = [&](int64_t p) { return bias_of_u(call.cell, in, p, call.H); };
  if (call.P == 1) return aligned(at::linear(in.x, in.w_ih[0], biased ? bias(0) : Tensor()));
  Tensor u = call.rows_of(call.cell.gates * call.H);
  const Tensor x = in.x.reshape({call.rows, in.x.size(-1)});
  for (const auto& [begin, count] : runs_of(in.reverse, call.P)) {
    if (count == 1) {
      Tensor own = u.select(0, begin);
      const Tensor w = in.w_ih[begin].t();
      biased ? at::addmm_out(own, bias(begin), x, w) : at::mm_out(own, x, w);
      continue;
    }
    Tensor own = u.narrow(0, begin, count);
    const Tensor w = at::stack(in.w_ih.slice(begin, count)).transpose(1, 2);
    const Tensor each = x.expand({count, x.size(0), x.size(1)});
    if (!biased) {
      at::bmm_out(own, each, w);
      continue;
    }
    std::vector<Tensor> biases;
    for (int64_t p = begin; p < begin + count; ++p) biases.push_back(bias(p));
    at::baddbmm_out(own, at::stack(biases).unsqueeze(1), each, w);
  }
  return u;
}

// The gradients of the weights, biases and x, from those of the projections.
class Products {
 public:
  Products(const CudaCall& call, const Tensor& du, const Tensor& dv, const Tensor& h_prev)
      : call_(call), in_(call.in), du_(du), dv_(dv), h_prev_(h_prev) {
    if (call.P > 1) runs_ = runs_of(in_.reverse, call.P);
  }

  // The recurrences add up in the dtype of x, as products that each begin from the sum before.
  Tensor of_x() const {
    Tensor sum = at::mm(own(du_, 0), in_.w_ih[0]);
    for (int64_t p = 1; p < call_.P; ++p) sum.addmm_(own(du_, p), in_.w_ih[p]);
    return sum.view(in_.x.sizes());
  }

  void add_w_ih(std::vector<Tensor>& out) const {
    const Tensor x = in_.x.reshape({call_.rows, in_.x.size(-1)});
    add(out, du_, [&](int64_t, int64_t count) {
      return count ? x.expand({count, x.size(0), x.size(1)}) : x;
    });
  }

  void add_w_hh(std::vector<Tensor>& out) const {
    add(out, dv_, [&](int64_t begin, int64_t count) {
      return count ? h_prev_.narrow(0, begin, count) : own(h_prev_, begin);
    });
  }

  void add_biases(std::vector<Tensor>& out) const {
    const size_t first = out.size();
    sums(out, du_);
    if (!call_.cell.all_summed()) return sums(out, dv_);
    for (size_t p = 0; p < static_cast<size_t>(call_.P); ++p) out.push_back(out[first + p].clone());
  }

 private:
  Tensor own(const Tensor& all, int64_t p) const { return call_.P == 1 ? all : all.select(0, p); }

  // Gradients of matrices: of the projections `of`, times other(first recurrence, recurrences),
  // which has no dimension of recurrences if there are 0.
  template <class Other>
  void add(std::vector<Tensor>& out, const Tensor& of, const Other& other) const {
    if (call_.P == 1) return out.push_back(at::mm(of.t(), other(0, 0)));
    for (const auto& [begin, count] : runs_) {
      if (count == 1) {
        out.push_back(at::mm(of.select(0, begin).t(), other(begin, 0)));
      } else {
        const Tensor part = of.narrow(0, begin, count).transpose(1, 2);
        for (const Tensor& each : at::bmm(part, other(begin, count)).unbind(0)) out.push_back(each);
      }
    }
  }

  void sums(std::vector<Tensor>& out, const Tensor& of) const {
    if (call_.P == 1) return out.push_back(of.sum(0));
    for (const auto& [begin, count] : runs_) {
      if (count == 1)
        out.push_back(of.select(0, begin).sum(0));
      else
        for (const Tensor& each : of.narrow(0, begin, count).sum(1).unbind(0)) out.push_back(each);
    }
  }

  const CudaCall& call_;
  const ScanInputs& in_;
  const Tensor &du_, &dv_, &h_prev_;
  std::vector<Run> runs_;
};

}  // namespace

std::optional<ScanOutputs> forward_on_cuda(const ScanInputs& in, bool tape) {
  const auto call = CudaCall::of(in, false);
  if (!call) return std::nullopt;
  const Tensor& x = call->x;
  const int64_t P = call->P, H = call->H;
  const c10::DeviceGuard on_device(x.device());
  c10::DimVector of_y(x.sizes());
  of_y.back() = P * H;
  const Tensor y = at::empty(of_y, x.options());
  const int64_t width = call->cell.tape_width(false, H, x.element_size() == 2 ? 2 : 1);
  const Tensor saved = at::empty({tape ? call->rows : 0, P, width, H}, x.options());
  const Tensor carry = call->between_steps(call->S + 1);
  std::vector<Tensor> states = call->new_states();
  const Tensor u = projected(*call);
  const Tensor b_hh = in.b_hh.empty() || call->cell.all_summed() ? Tensor() : stacked(in.b_hh);
  Sweep sweep;
  const GivenStates s0(in.s0, sweep.s0);
  receive(states, sweep.last);
  sweep.u = u.data_ptr();
  sweep.b_hh = address(b_hh);
  sweep.carry = const_cast<void*>(address(carry));
  sweep.y = y.data_ptr();
  sweep.tape = tape ? saved.data_ptr() : nullptr;
  if (!call->run(sweep)) return std::nullopt;
  return ScanOutputs{y, std::move(states), saved};
}

std::optional<std::vector<Tensor>> backward_on_cuda(const ScanInputs& in, const OutputGrads& grads,
                                                    const Tensor& y, const Tensor& tape,
                                                    const Needs& needs) {
  if (grads.dsteps.defined()) return std::nullopt;
  const auto call = CudaCall::of(in, true);
  if (!call) return std::nullopt;
  const int64_t H = call->H;
  if (tape.size(2) && tape.size(0) != call->rows) return std::nullopt;  // to be computed again
  const c10::DeviceGuard on_device(in.x.device());
  const Tensor dy = grads.dy.defined() ? aligned(grads.dy) : Tensor();
  const Tensor outputs = aligned(y), saved = aligned(tape);
  const Tensor ds = call->between_steps(call->S);
  std::vector<Tensor> ds0;
  if (needs[kNeedStates] && !in.s0.empty()) ds0 = call->new_states();
  const Tensor dv = call->rows_of(call->cell.gates * H);
  const Tensor du = call->cell.all_summed() ? dv : at::empty_like(dv);
  const Tensor h_prev = call->rows_of(H);
  Sweep sweep;
  const GivenStates s0(in.s0, sweep.s0), dlast(grads.dstates, sweep.dlast);
  receive(ds0, sweep.ds0);
  sweep.dy = address(dy);
  sweep.y = outputs.data_ptr();
  sweep.tape = saved.data_ptr();
  sweep.ds = const_cast<void*>(address(ds));
  sweep.du = du.data_ptr();
  sweep.dv = dv.data_ptr();
  sweep.h_prev = h_prev.data_ptr();
  if (!call->run(sweep)) return std::nullopt;
  const Products products(*call, du, dv, h_prev);
  std::vector<Tensor> out;
  if (needs[kNeedX]) out.push_back(products.of_x());
  if (needs[kNeedWih]) products.add_w_ih(out);
  if (needs[kNeedWhh]) products.add_w_hh(out);
  if (needs[kNeedBias] && !in.b_ih.empty()) products.add_biases(out);
  out.insert(out.end(), ds0.begin(), ds0.end());
  return out;
}

}  // namespace fastrnn
