// The CPU kernel on tensors: outputs, workspace, and the backward pass chunk by chunk.
#include "binding/cpu_kernel.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>

#include "cpu/memory.h"

namespace fastrnn {
namespace {

// at::empty and at::zeros without the dispatcher, which takes longer than a small tensor is worth,
// and from pages that cost little to touch first.
Tensor fresh(at::IntArrayRef size, at::ScalarType type) {
  Tensor out = at::detail::empty_cpu(size, type);
  if (out.nbytes() >= 2 * kHugePage) prefer_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}
Tensor fresh_zeros(at::IntArrayRef size, at::ScalarType type) {
  Tensor out = fresh(size, type);
  if (out.nbytes() > 0) std::memset(out.mutable_data_ptr(), 0, out.nbytes());
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

void check_prepacked(const CellFacts& cell, const ScanInputs& in, const Shape& n,
                     at::ScalarType compute) {
  if (in.packed.empty()) return;
  TORCH_CHECK(static_cast<int64_t>(in.packed.size()) == n.P,
              "scan: packed should hold one tensor per scan, ", n.P, ", got ", in.packed.size());
  const bool in_double = compute == at::kDouble;
  const int64_t bytes =
      cell.code(in_double).prepacked_bytes[in_double]({n.I, n.H, n.Q, n.projected});
  for (const Tensor& each : in.packed)
    TORCH_CHECK(each.is_cpu() && each.scalar_type() == compute && each.is_contiguous() &&
                    static_cast<int64_t>(each.nbytes()) == bytes,
                "scan: prepacked weights of ", each.nbytes(), " bytes, ", each.scalar_type(),
                ", do not fit weights that take ", bytes, " bytes of ", compute);
}

void out_of_memory(bool done) {
  TORCH_CHECK_WITH(OutOfMemoryError, done,
                   "fastrnn: no memory for prepacked weights and one chunk");
}

}  // namespace

Tensor pack(const CellFacts& cell, const Tensor& w_ih, const Tensor& w_hh,
            const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
            const std::optional<Tensor>& w_hr) {
  const auto list = [](const std::optional<Tensor>& each) {
    return each ? std::vector<Tensor>{*each} : std::vector<Tensor>{};
  };
  const auto bi = list(b_ih), bh = list(b_hh), hr = list(w_hr);
  const std::optional<Tensor> none;
  const Tensor x = at::empty({0, 1, w_ih.size(-1)}, w_ih.options());
  const ScanInputs in{cell.name, x, w_ih, w_hh, bi, bh, hr, {}, none, none, none, 0};
  const Shape n = checked_shape(cell, in);
  TORCH_CHECK(x.is_cpu(), "pack: the weights should be on the CPU, are on ", x.device());
  TORCH_CHECK(!n.projected || cell.projectable, "pack: cell ", cell.name, " cannot be projected");
  const at::ScalarType compute = compute_type(x.scalar_type());
  const Operands operands(in, n, compute);
  const RecurrenceSizes sizes{n.I, n.H, n.Q, n.projected};
  const bool in_double = compute == at::kDouble;
  const int64_t numbers =
      cell.code(in_double).prepacked_bytes[in_double](sizes) / at::elementSize(compute);
  const Tensor prepacked = at::empty({numbers}, x.options().dtype(compute));
  cell.code(in_double).pack[in_double](sizes, operands.recurrences[0],
                                       prepacked.mutable_data_ptr());
  return prepacked;
}

ScanOutputs forward_on_cpu(const Call& call, const CpuPlan& plan, bool tape) {
  const auto& [cell, in, n, tables] = call;
  const at::ScalarType compute = compute_type(in.x.scalar_type());
  const Storage storage = storage_of(in.x.scalar_type());
  check_prepacked(cell, in, n, compute);
  const Operands operands(in, n, compute);
  const Tensor x = with_unit_stride(in.x);
  const at::ScalarType stored = x.scalar_type();

  auto y_size = x.sizes().vec();
  y_size.back() = n.P * n.Q;
  ScanOutputs out;
  auto& [y, states, saved] = out;
  y = in.lengths ? fresh_zeros(y_size, stored) : fresh(y_size, stored);
  saved = fresh({tape ? n.R : 0, n.P, cell.tape_width(n.projected), n.H}, stored);
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
  const bool in_double = compute == at::kDouble;
  out_of_memory(cell.code(in_double).forward[in_double](args, plan));
  return out;
}

std::vector<Tensor> backward_on_cpu(const Call& call, const CpuPlan& plan, const OutputGrads& grads,
                                    const Tensor& y, const Tensor& tape, const Needs& needs) {
  const auto& [cell, in, n, tables] = call;
  const at::ScalarType stored = in.x.scalar_type(), compute = compute_type(stored);
  TORCH_CHECK(tape.sizes() == at::IntArrayRef({n.R, n.P, cell.tape_width(n.projected), n.H}) &&
                  tape.scalar_type() == stored && y.numel() == n.R * n.P * n.Q &&
                  y.scalar_type() == stored,
              "scan_backward: y and tape should be those of scan with tape=True, got ", y.sizes(),
              " and ", tape.sizes());
  TORCH_CHECK(tape.is_cpu() && y.is_cpu(), "scan_backward: y and tape should be on the CPU");
  TORCH_CHECK(!grads.dy.defined() || (grads.dy.sizes() == y.sizes() && grads.dy.is_cpu()),
              "scan_backward: dy should be like y, ", y.sizes(), " on the CPU, got ",
              grads.dy.sizes(), " on ", grads.dy.device());
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
  const Operands operands(in, n, compute);
  const int64_t S = cell.states, depth = cell.gates * n.H;
  const bool summed = cell.all_summed();
  const Tensor y_rows = y.contiguous(), tape_rows = tape.contiguous();
  const Tensor dy = grads.dy.defined() ? grads.dy.to(stored).contiguous() : Tensor();

  // Gradients of the states, carried from chunk to chunk in the compute type.
  std::vector<Tensor> ds(S);
  std::vector<void*> carried(n.P * S);
  for (int64_t s = 0; s < S; ++s) {
    const Tensor& last = grads.dstates[s];
    ds[s] = last.defined() ? last.to(compute, false, true).contiguous()
                           : fresh_zeros(n.state_size(s), compute);
    for (int64_t p = 0; p < n.P; ++p)
      carried[p * S + s] = static_cast<char*>(ds[s].mutable_data_ptr()) +
                           p * n.B * n.width(s) * static_cast<int64_t>(ds[s].itemsize());
  }

  const int64_t most = std::min(std::max(plan.chunk_rows, n.B), tables.live_rows());
  BackwardArgs args;
  operands.fill(args, n, tables, storage_of(stored));
  const Workspace workspace(
      compute, {n.P * most * depth, summed ? 0 : n.P * most * depth, n.P * most * n.Q,
                n.projected ? n.P * most * n.Q : 0, prepacked_for_backward(args, cell.gates),
                needs[kNeedX] ? n.P * prepacked_width(n.I) * depth : 0});
  const auto pointers_of = [&](int part, int64_t width) {
    std::vector<void*> at(n.P);
    for (int64_t p = 0; p < n.P; ++p) at[p] = workspace.at(part, p * most * width);
    return at;
  };
  const auto dv_pointers = pointers_of(0, depth), du_pointers = pointers_of(summed ? 0 : 1, depth),
             h_prev_pointers = pointers_of(2, n.Q), dh_pointers = pointers_of(3, n.Q);
  const bool bias = needs[kNeedBias] && !in.b_ih.empty();
  const bool several = n.P > 1 || in.lengths;  // rows of dx that are added to, or never reached
  Gradients out;
  if (needs[kNeedX])
    out.x = several ? fresh_zeros({n.R, n.I}, compute) : fresh({n.R, n.I}, compute);
  const auto zeros = [&](bool needed, std::vector<Tensor>& to, at::IntArrayRef size) {
    std::vector<void*> pointers;
    for (int64_t p = 0; needed && p < n.P; ++p)
      pointers.push_back(to.emplace_back(fresh_zeros(size, compute)).mutable_data_ptr());
    return pointers;
  };
  const auto dw_ih = zeros(needs[kNeedWih], out.w_ih, {depth, n.I});
  const auto dw_hh = zeros(needs[kNeedWhh], out.w_hh, {depth, n.Q});
  const auto dw_hr = zeros(needs[kNeedWhr] && n.projected, out.w_hr, {n.Q, n.H});
  const auto db_ih = zeros(bias, out.b_ih, {depth});
  const auto db_hh = zeros(bias && !summed, out.b_hh, {depth});
  const auto or_null = [](const std::vector<void*>& v) { return v.empty() ? nullptr : v.data(); };

  args.dy = dy.defined() ? dy.const_data_ptr() : nullptr;
  args.y = y_rows.const_data_ptr();
  args.tape = tape_rows.const_data_ptr();
  args.ds = carried.data();
  args.du = du_pointers.data();
  args.dv = dv_pointers.data();
  args.h_prev = h_prev_pointers.data();
  args.dh = n.projected ? dh_pointers.data() : nullptr;

  const Tensor x = with_unit_stride(in.x);
  GradientArgs rest;
  rest.rows = args.rows;
  rest.inputs = n.I;
  rest.hidden = n.H;
  rest.recurrent = n.Q;
  rest.depth = depth;
  rest.recurrences = args.recurrences;
  rest.storage = args.storage;
  rest.recurrence = args.recurrence;
  rest.x = x.const_data_ptr();
  rest.x_row = x.stride(-2);
  rest.x_step = x.dim() == 3 ? x.stride(0) : 0;
  rest.du = du_pointers.data();
  rest.dv = dv_pointers.data();
  rest.h_prev = h_prev_pointers.data();
  rest.dh = dh_pointers.data();
  rest.tape = tape_rows.const_data_ptr();
  rest.tape_width = tape_rows.size(2);
  rest.dw_hr = or_null(dw_hr);
  rest.dw_ih = or_null(dw_ih);
  rest.dw_hh = or_null(dw_hh);
  rest.db_ih = or_null(db_ih);
  rest.db_hh = or_null(db_hh);
  rest.dx = needs[kNeedX] ? out.x.mutable_data_ptr() : nullptr;

  int32_t prepacked_for = 0;
  args.prepacked = workspace.at(4);
  args.prepacked_for = &prepacked_for;
  rest.prepacked = workspace.at(5);

  const bool in_double = compute == at::kDouble;
  for (int64_t end = n.T, begin; end > 0; end = begin) {
    begin = tables.chunk_begin(end, most);
    args.begin = rest.begin = begin;
    args.end = rest.end = end;
    out_of_memory(cell.code(in_double).backward[in_double](args, plan));
    out_of_memory(run_gradients(in_double, rest, plan));
  }

  if (bias && summed)
    for (const Tensor& each : out.b_ih) out.b_hh.push_back(each.clone());
  if (needs[kNeedX]) out.x = out.x.view(in.x.sizes()).to(stored);
  for (auto* group : {&out.w_ih, &out.w_hh, &out.b_ih, &out.b_hh, &out.w_hr})
    for (Tensor& each : *group) each = each.to(stored);
  if (needs[kNeedStates] && !in.s0.empty())
    for (const Tensor& each : ds) out.s0.push_back(each.to(stored));
  return out.flat(needs);
}

}  // namespace fastrnn
