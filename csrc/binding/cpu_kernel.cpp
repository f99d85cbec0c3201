// The CPU kernel on tensors: outputs, workspace, and the backward pass chunk by chunk.
#include "binding/cpu_kernel.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>

#include "binding/output_memory.h"
#include "cpu/contention.h"
#include "cpu/memory.h"
#include "cpu/spin.h"

namespace fastrnn {
namespace {

// `tensor.clone()` of a contiguous tensor, without the dispatcher.
Tensor copy_of(const Tensor& tensor) {
  Tensor out = fresh(tensor.sizes(), tensor.scalar_type());
  if (out.nbytes() > 0) std::memcpy(out.mutable_data_ptr(), tensor.const_data_ptr(), out.nbytes());
  return out;
}

// Buffers of a call, by their numbers of elements.
class Workspace {
 public:
  Workspace(at::ScalarType type, std::initializer_list<int64_t> parts)
      : itemsize_(c10::elementSize(type)) {
    size_t bytes = 0;
    for (int64_t part : parts) {
      begin_.push_back(bytes);
      bytes += (part * itemsize_ + kAlign - 1) / kAlign * kAlign;
    }
    block_ = cached().borrow(bytes + kAlign);
    TORCH_CHECK_WITH(OutOfMemoryError, block_, "fastrnn: no memory for ", bytes, " bytes");
  }
  ~Workspace() { cached().give_back(block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* at(int part, int64_t element = 0) const {
    return block_ + begin_[part] + element * itemsize_;
  }

 private:
  static constexpr size_t kAlign = 128;
  static CachedMemory& cached() {
    thread_local CachedMemory memory;
    return memory;
  }

  size_t itemsize_;
  c10::SmallVector<size_t, 8> begin_;
  char* block_;
};

void check_prepacked(const CellFacts& cell, const ScanInputs& in, const Shape& n) {
  if (in.packed.empty()) return;
  const at::ScalarType compute = compute_type(in.format);
  TORCH_CHECK(compute == compute_type(in.x.scalar_type()), "scan: weights packed in ",
              name_of(in.format), " do not fit x, which is ", in.x.scalar_type());
  TORCH_CHECK(static_cast<int64_t>(in.packed.size()) == n.P,
              "scan: packed should hold one tensor per recurrence, ", n.P, ", got ",
              in.packed.size());
  const int64_t bytes =
      cell.code(in.format).prepacked_bytes[index_of(in.format)]({n.I, n.H, n.Q, n.projected});
  for (const Tensor& each : in.packed)
    TORCH_CHECK(each.is_cpu() && each.scalar_type() == compute && each.is_contiguous() &&
                    static_cast<int64_t>(each.nbytes()) == bytes,
                "scan: prepacked weights of ", each.nbytes(), " bytes, ", each.scalar_type(),
                ", do not fit weights that take ", bytes, " bytes of ", compute);
}

// Tells `contention` whether the threads of a call were late.
class Punctuality {
 public:
  explicit Punctuality(const CpuPlan& plan)
      : begin_(plan.split_units > 1 && contention().remembered() ? nanoseconds() : 0) {}
  ~Punctuality() {
    if (late_)
      contention().late(nanoseconds());
    else if (begin_)
      contention().undisturbed(nanoseconds() - begin_);
  }
  Punctuality(const Punctuality&) = delete;
  Punctuality& operator=(const Punctuality&) = delete;

  bool* late() { return &late_; }

 private:
  bool late_ = false;
  int64_t begin_;
};

void check_memory(bool enough) {
  TORCH_CHECK_WITH(OutOfMemoryError, enough,
                   "fastrnn: no memory for prepacked weights and one chunk");
}

int64_t tape_width(const Call& call) {
  const at::ScalarType stored = call.in.x.scalar_type();
  const int64_t ratio = c10::elementSize(compute_type(stored)) / c10::elementSize(stored);
  return call.cell.tape_width(call.n.projected, call.n.H, ratio);
}

void check_backward(const Call& call, const OutputGrads& grads, const Tensor& y,
                    const Tensor& tape) {
  const auto& [cell, in, n, tables] = call;
  const at::ScalarType stored = in.x.scalar_type();
  TORCH_CHECK(tape.sizes() == at::IntArrayRef({n.R, n.P, tape_width(call), n.H}) &&
                  tape.scalar_type() == stored && y.numel() == n.R * n.P * n.Q &&
                  y.scalar_type() == stored,
              "scan_backward: y and tape should be those of scan with tape=True, got ", y.sizes(),
              " and ", tape.sizes());
  TORCH_CHECK(tape.is_cpu() && y.is_cpu(), "scan_backward: y and tape should be on the CPU");
  TORCH_CHECK(!grads.dy.defined() || (grads.dy.sizes() == y.sizes() && grads.dy.is_cpu()),
              "scan_backward: dy should be like y, ", y.sizes(), " on the CPU, got ",
              grads.dy.sizes(), " on ", grads.dy.device());
  const int64_t others = cell.states - 1;
  TORCH_CHECK(!grads.dsteps.defined() ||
                  (grads.dsteps.sizes() == at::IntArrayRef({n.R, n.P, others, n.H}) &&
                   grads.dsteps.is_cpu()),
              "scan_backward: dsteps should be like the states of all steps, got ",
              grads.dsteps.sizes(), " on ", grads.dsteps.device());
  TORCH_CHECK(static_cast<int32_t>(grads.dstates.size()) == cell.states,
              "scan_backward: dstates should hold ", cell.states, " gradients or None, got ",
              grads.dstates.size());
  for (int32_t s = 0; s < cell.states; ++s) {
    const Tensor& each = grads.dstates[s];
    TORCH_CHECK(!each.defined() || (each.sizes() == n.state_size(s) && each.is_cpu()),
                "scan_backward: the gradient of state ", s, " should be ",
                at::IntArrayRef(n.state_size(s)), " on the CPU, got ", each.sizes(), " on ",
                each.device());
  }
}

using Pointers = std::vector<void*>;
void* const* or_null(const Pointers& pointers) {
  return pointers.empty() ? nullptr : pointers.data();
}

// Gradients of the states in the compute type, which the chunks carry to each other, and of those
// in which episodes begin.
struct StateGradients {
  std::vector<Tensor> ds, dreset;  // S each; the latter if it is needed
  Pointers at, reset_at;           // [P][S]

  StateGradients(const Call& call, const OutputGrads& grads, const Needs& needs,
                 at::ScalarType compute)
      : ds(call.cell.states) {
    const Shape& n = call.n;
    const int64_t S = call.cell.states;
    for (int64_t s = 0; s < S; ++s) {
      const Tensor& last = grads.dstates[s];
      ds[s] = last.defined() ? last.to(compute, false, true).contiguous()
                             : fresh_zeros(n.state_size(s), compute);
      if (needs[kNeedResetStates] && !call.in.reset_states.empty())
        dreset.push_back(fresh_zeros(n.state_size(s), compute));
    }
    at = pointers(n, ds);
    reset_at = pointers(n, dreset);
  }

 private:
  static Pointers pointers(const Shape& n, const std::vector<Tensor>& states) {
    Pointers to;
    for (int64_t p = 0; p < n.P; ++p)
      for (size_t s = 0; s < states.size(); ++s)
        to.push_back(static_cast<char*>(states[s].mutable_data_ptr()) +
                     p * n.B * n.width(s) * static_cast<int64_t>(states[s].itemsize()));
    return to;
  }
};

// What the sweep of a chunk hands to the products for its gradients, and prepacked weights.
class ChunkBuffers {
 public:
  // `rows` are the most of a chunk; `recurrent` and `inputs` the numbers of weights that are
  // packed.
  ChunkBuffers(const Call& call, Format format, at::ScalarType compute, int64_t rows,
               int64_t recurrent, int64_t inputs)
      : P_(call.n.P),
        rows_(rows),
        du_row_(gradient_row(format, call.cell.input_gates * call.n.H)),
        dv_row_(gradient_row(format, call.cell.recurrent_gates * call.n.H)),
        dh_row_(gradient_row(format, call.n.Q)),
        Q_(call.n.Q),
        sites_(call.cell.sites),
        operands_row_(sites_ * call.n.H),
        summed_(call.cell.all_summed()),
        projected_(call.n.projected),
        workspace_(compute, {P_ * rows * dv_row_, summed_ ? 0 : P_ * rows * du_row_, P_ * rows * Q_,
                             projected_ ? P_ * rows * dh_row_ : 0, recurrent, inputs,
                             P_ * rows * operands_row_}),
        dv_(pointers(kDv, dv_row_)),
        du_(pointers(summed_ ? kDv : kDu, du_row_)),
        h_prev_(pointers(kHPrev, Q_)),
        dh_(pointers(kDh, dh_row_)),
        operands_(pointers(kOperands, operands_row_)),
        site_of_(call.cell.site_of) {}

  void fill(BackwardArgs& args, GradientArgs& products) {
    products.du = args.du = du_.data();
    products.dv = args.dv = dv_.data();
    products.h_prev = args.h_prev = h_prev_.data();
    args.dh = projected_ ? dh_.data() : nullptr;
    products.dh = dh_.data();
    products.operands = args.operands = operands_.data();
    products.sites = sites_;
    products.site_of = site_of_;
    args.prepacked = workspace_.at(kRecurrentWeights);
    args.prepacked_for = &prepacked_for_;
    products.prepacked = workspace_.at(kInputWeights);
  }

 private:
  enum Part { kDv, kDu, kHPrev, kDh, kRecurrentWeights, kInputWeights, kOperands };

  Pointers pointers(Part part, int64_t width) const {
    Pointers at(P_);
    for (int64_t p = 0; p < P_; ++p) at[p] = workspace_.at(part, p * rows_ * width);
    return at;
  }

  const int64_t P_, rows_, du_row_, dv_row_, dh_row_, Q_, sites_, operands_row_;
  const bool summed_, projected_;
  const Workspace workspace_;
  const Pointers dv_, du_, h_prev_, dh_, operands_;
  const int8_t* const site_of_;
  int32_t prepacked_for_ = 0;
};

// Adds the numbers [begin, begin + size) of each row to `to`, one row after the other.
template <class T>
void add_rows(const Tensor& rows, int64_t begin, int64_t size, T* to) {
  if (rows.numel() == 0) return;
  const int64_t width = rows.numel() / rows.size(0);
  const T* from = rows.const_data_ptr<T>() + begin;
  for (int64_t r = 0; r < rows.size(0); ++r, from += width)
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}
Tensor sum_of_rows(const Tensor& rows, int64_t begin, int64_t size) {
  Tensor sum = fresh_zeros({size}, rows.scalar_type());
  if (rows.scalar_type() == at::kDouble)
    add_rows(rows, begin, size, sum.mutable_data_ptr<double>());
  else
    add_rows(rows, begin, size, sum.mutable_data_ptr<float>());
  return sum;
}

// Gradients of x, weights and biases in the compute type, which the first chunk begins and the
// others add to.
class WeightGradients {
 public:
  WeightGradients(const Call& call, const Needs& needs, at::ScalarType compute)
      : call_(call), needs_(needs), bias_(needs[kNeedBias] && !call.in.b_ih.empty()) {
    const Shape& n = call.n;
    const int64_t of_u = call.cell.input_gates * n.H, of_v = call.cell.recurrent_gates * n.H;
    const bool summed = call.cell.all_summed();
    // Rows of dx that several recurrences add to, or that none reaches.
    const bool from_zero = n.P > 1 || call.in.lengths;
    const at::IntArrayRef x_size = call.in.x.sizes();
    if (needs[kNeedX])
      tensors_.x = from_zero ? fresh_zeros(x_size, compute) : fresh(x_size, compute);
    const uint64_t reverse = call.in.reverse, all = ~uint64_t{0} >> (64 - n.P);
    if (needs[kNeedX] && n.P > 2 && reverse != 0 && reverse != all)
      dx_reverse_ = fresh_zeros(x_size, compute);
    const auto make = [&](bool needed, std::vector<Tensor>& to, at::IntArrayRef size) {
      Pointers pointers;
      for (int64_t p = 0; needed && p < n.P; ++p) {
        to.push_back(n.T > 0 && n.B > 0 ? fresh(size, compute) : fresh_zeros(size, compute));
        pointers.push_back(to.back().mutable_data_ptr());
      }
      return pointers;
    };
    dw_ih_ = make(needs[kNeedWih], tensors_.w_ih, {of_u, n.I});
    dw_hh_ = make(needs[kNeedWhh], tensors_.w_hh, {of_v, n.Q});
    dw_hr_ = make(needs[kNeedWhr] && n.projected, tensors_.w_hr, {n.Q, n.H});
    db_ih_ = make(bias_, tensors_.b_ih, {of_u});
    db_hh_ = make(bias_ && !summed, tensors_.b_hh, {of_v});
    for (int64_t p = 0; needs[kNeedParams] && call.cell.params && p < n.P; ++p) {
      params_.push_back(fresh_zeros({n.B, call.cell.params, n.H}, compute));
      dp_.push_back(params_.back().mutable_data_ptr());
    }
  }

  void fill(BackwardArgs& args, GradientArgs& products) {
    args.dp = or_null(dp_);
    products.dw_ih = or_null(dw_ih_);
    products.dw_hh = call_.cell.recurrent_gates ? or_null(dw_hh_) : nullptr;
    products.dw_hr = or_null(dw_hr_);
    products.db_ih = or_null(db_ih_);
    products.db_hh = call_.cell.recurrent_gates ? or_null(db_hh_) : nullptr;
    products.dx = needs_[kNeedX] ? tensors_.x.mutable_data_ptr() : nullptr;
    products.dx_reverse = dx_reverse_.defined() ? dx_reverse_.mutable_data_ptr() : nullptr;
  }

  // All gradients in the dtype of x, in the order of the operator.
  std::vector<Tensor> in_dtype_of_x(const StateGradients& states) {
    const at::ScalarType stored = call_.in.x.scalar_type();
    if (bias_ && call_.cell.all_summed())
      for (const Tensor& each : tensors_.b_ih) tensors_.b_hh.push_back(copy_of(each));
    if (dx_reverse_.defined()) tensors_.x.add_(dx_reverse_);
    if (needs_[kNeedX]) tensors_.x = converted(tensors_.x, stored);
    for (const Tensor& sequences : params_)
      for_each_param(call_.cell, [&](int64_t k, int64_t rows) {
        const Tensor each = sum_of_rows(sequences, k * call_.n.H, rows * call_.n.H);
        tensors_.params.push_back(call_.cell.is_shared(k) ? each.sum().unsqueeze(0) : each);
      });
    for (auto* group : {&tensors_.w_ih, &tensors_.w_hh, &tensors_.b_ih, &tensors_.b_hh,
                        &tensors_.w_hr, &tensors_.params})
      for (Tensor& each : *group) each = converted(each, stored);
    if (needs_[kNeedStates] && !call_.in.s0.empty())
      for (const Tensor& each : states.ds) tensors_.s0.push_back(converted(each, stored));
    for (const Tensor& each : states.dreset)
      tensors_.reset_states.push_back(converted(each, stored));
    return tensors_.flat(needs_);
  }

 private:
  const Call& call_;
  const Needs& needs_;
  const bool bias_;
  Gradients tensors_;
  Tensor dx_reverse_;
  std::vector<Tensor> params_;  // [B, N, H] for each recurrence
  Pointers dw_ih_, dw_hh_, dw_hr_, db_ih_, db_hh_, dp_;
};

// Sets the scales of a recurrence, which point to the tensors that are returned.
std::vector<Tensor> add_scales(Recurrence& recurrence, Format format,
                               const std::vector<Tensor> (&weights)[6],
                               const std::vector<Tensor>& scales) {
  std::vector<Tensor> rows;
  if (!is_scaled(format)) return rows;
  const size_t wanted = weights[4].empty() ? 2 : 3;
  TORCH_CHECK(scales.size() == wanted, "pack: ", name_of(format), " needs ", wanted,
              " tensors of scales, got ", scales.size());
  const float** to[] = {&recurrence.scale_ih, &recurrence.scale_hh, &recurrence.scale_hr};
  for (size_t k = 0; k < wanted; ++k) {
    const Tensor& matrix = weights[k == 2 ? 4 : k][0];
    TORCH_CHECK(scales[k].dim() == 1 && scales[k].size(0) == matrix.size(0) && scales[k].is_cpu() &&
                    matrix.scalar_type() == at::kChar,
                "pack: ", name_of(format), " needs int8 matrices with a scale for each row, got ",
                matrix.scalar_type(), " ", matrix.sizes(), " and scales ", scales[k].sizes());
    rows.push_back(scales[k].to(at::kFloat).contiguous());
    *to[k] = rows.back().const_data_ptr<float>();
  }
  return rows;
}

}  // namespace

Tensor pack(const CellFacts& cell, Format format, const std::vector<std::optional<Tensor>>& weights,
            const std::vector<Tensor>& scales) {
  TORCH_CHECK(weights.size() >= 5 && weights[0] && weights[1],
              "pack: the weights should be (w_ih, w_hh, b_ih, b_hh, w_hr, *params)");
  std::vector<Tensor> list[6];
  for (size_t k = 0; k < weights.size(); ++k)
    if (weights[k]) list[std::min<size_t>(k, 5)].push_back(*weights[k]);
  const auto& [w_ih, w_hh, b_ih, b_hh, w_hr, params] = list;
  const std::optional<Tensor> none;
  const at::ScalarType compute = compute_type(format);
  const at::ScalarType type = b_ih.empty() ? w_ih[0].scalar_type() : b_ih[0].scalar_type();
  const Tensor x = at::empty({0, 1, w_ih[0].size(-1)}, w_ih[0].options().dtype(type));
  ScanInputs in{cell.name, x,  w_ih, w_hh, b_ih, b_hh, w_hr, params,
                {},        {}, none, none, none, none, 0};
  in.packed = w_ih;  // for the check of shapes alone, which then accepts matrices in the format
  const Shape n = checked_shape(cell, in);
  in.packed = {};
  TORCH_CHECK(x.is_cpu(), "pack: the weights should be on the CPU, are on ", x.device());
  TORCH_CHECK(!n.projected || cell.projectable, "pack: cell ", cell.name, " cannot be projected");
  const Operands operands(cell, in, n, format);
  Recurrence recurrence = operands.recurrences[0];
  std::vector<Tensor> rows = add_scales(recurrence, format, list, scales);
  const RecurrenceSizes sizes{n.I, n.H, n.Q, n.projected};
  const CompiledCell& code = cell.code(format);
  const int at = index_of(format);
  const int64_t numbers = code.prepacked_bytes[at](sizes) / at::elementSize(compute);
  const Tensor prepacked = at::empty({numbers}, x.options().dtype(compute));
  code.pack[at](sizes, recurrence, prepacked.mutable_data_ptr());
  return prepacked;
}

ScanOutputs forward_on_cpu(const Call& call, const CpuPlan& plan, bool tape) {
  const auto& [cell, in, n, tables] = call;
  const Format format = format_of(in);
  const Storage storage = storage_of(in.x.scalar_type());
  check_prepacked(cell, in, n);
  const Operands operands(cell, in, n, format);
  const Tensor x = with_unit_stride(in.x);
  const at::ScalarType stored = x.scalar_type();

  auto y_size = x.sizes().vec();
  y_size.back() = n.P * n.Q;
  ScanOutputs out;
  auto& [y, states, saved] = out;
  y = in.lengths ? fresh_zeros(y_size, stored) : fresh(y_size, stored);
  saved = tape_memory({tape ? n.R : 0, n.P, tape_width(call), n.H}, stored);
  if (in.lengths && tape) saved.zero_();
  std::vector<void*> finals(n.P * cell.states);
  for (int32_t s = 0; s < cell.states; ++s) {
    states.push_back(fresh(n.state_size(s), stored));
    for (int64_t p = 0; p < n.P; ++p)
      finals[p * cell.states + s] = static_cast<char*>(states.back().mutable_data_ptr()) +
                                    p * n.B * n.width(s) * static_cast<int64_t>(x.itemsize());
  }

  ForwardArgs args;
  operands.fill(args, n, tables, storage);
  args.x = x.const_data_ptr();
  args.x_row = x.stride(-2);
  args.x_step = x.dim() == 3 ? x.stride(0) : 0;
  args.y = y.mutable_data_ptr();
  args.tape = tape ? saved.mutable_data_ptr() : nullptr;
  args.final_states = finals.data();
  Punctuality punctuality(plan);
  args.late = punctuality.late();
  check_memory(cell.code(format).forward[index_of(format)](args, plan));
  return out;
}

std::vector<Tensor> backward_on_cpu(const Call& call, const CpuPlan& plan, const OutputGrads& grads,
                                    const Tensor& y, const Tensor& tape, const Needs& needs) {
  const auto& [cell, in, n, tables] = call;
  check_backward(call, grads, y, tape);
  const at::ScalarType stored = in.x.scalar_type(), compute = compute_type(stored);
  const Format format = format_of(stored);
  const Operands operands(cell, in, n, plain_format(stored));
  const Tensor x = with_unit_stride(in.x), y_rows = y.contiguous(), tape_rows = tape.contiguous();
  const auto in_storage = [&](const Tensor& gradient) {
    return gradient.defined() ? converted(gradient, stored).contiguous() : Tensor();
  };
  const Tensor dy = in_storage(grads.dy), dsteps = in_storage(grads.dsteps);
  StateGradients states(call, grads, needs, compute);
  WeightGradients weights(call, needs, compute);

  BackwardArgs args;
  GradientArgs products;
  operands.fill(args, n, tables, storage_of(stored));
  operands.fill(products, n, tables, storage_of(stored));
  const int64_t most = std::min(std::max(plan.chunk_rows, n.B), tables.live_rows());
  const bool prepacks = backward_layout(format, plan.weights) == WeightLayout::kPrepacked;
  ChunkBuffers buffers(
      call, format, compute, most,
      prepacks ? prepacked_for_backward(args, cell.recurrent_gates) : 0,
      prepacks && needs[kNeedX] ? n.P * prepacked_width(n.I) * cell.input_gates * n.H : 0);
  buffers.fill(args, products);
  weights.fill(args, products);
  args.dy = dy.defined() ? dy.const_data_ptr() : nullptr;
  args.dsteps = dsteps.defined() ? dsteps.const_data_ptr() : nullptr;
  args.y = y_rows.const_data_ptr();
  args.tape = products.tape = tape_rows.const_data_ptr();
  args.ds = states.at.data();
  args.dreset = or_null(states.reset_at);
  products.depth = cell.input_gates * n.H;
  products.recurrent_depth = cell.recurrent_gates * n.H;
  products.x = x.const_data_ptr();
  products.x_row = x.stride(-2);
  products.x_step = x.dim() == 3 ? x.stride(0) : 0;
  products.tape_width = tape_rows.size(2);
  products.unprojected = cell.states - 1 + cell.saved;

  Punctuality punctuality(plan);
  bool& late = *punctuality.late();
  args.late = products.late = &late;
  for (int64_t end = n.T, begin; end > 0; end = begin) {
    begin = tables.chunk_begin(end, most);
    args.begin = products.begin = begin;
    args.end = products.end = end;
    // A team that broke up would do so again in the next chunk.
    const CpuPlan now = late && plan.split_units > 1 ? plan.on_one_thread() : plan;
    check_memory(cell.code(format).backward[index_of(format)](args, now));
    check_memory(run_gradients(format, products, now));
  }
  return weights.in_dtype_of_x(states);
}

}  // namespace fastrnn
