// The CPU kernel on tensors: checks, row tables, memory, and the stretches of the way back.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "memory.h"
#include "ops.h"

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
    block_ = kept().borrow(bytes + kAlign);
    TORCH_CHECK_WITH(OutOfMemoryError, block_, "fastrnn: no memory for ", bytes, " bytes");
  }
  ~Workspace() { kept().give_back(block_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* at(int part, int64_t element = 0) const {
    return block_ + begin_[part] + element * itemsize_;
  }

 private:
  static constexpr size_t kAlign = 128;
  static KeptMemory& kept() {
    thread_local KeptMemory memory;
    return memory;
  }

  size_t itemsize_;
  c10::SmallVector<size_t, 8> begin_;
  char* block_;
};

struct Shape {
  int64_t T, B, R, I, H, Q, P;
  bool projected;

  int64_t width(int64_t state) const { return state ? H : Q; }
};

// Checks what memory safety needs; modules have said it in torch.nn's words before.
Shape checked_shape(const CellFacts& cell, const ScanInputs& in) {
  const Tensor& x = in.x;
  const int64_t G = cell.gates, P = in.w_hh.size();
  TORCH_CHECK(
      x.dim() == 3 || (x.dim() == 2 && !in.lengths),
      "scan: x should be [T, B, I], packed [R, I] with batch_sizes, or [B, I] for one step, "
      "got ",
      x.sizes());
  TORCH_CHECK(P >= 1 && P <= 64, "scan: 1 to 64 scans side by side, got ", P);
  TORCH_CHECK(!in.batch_sizes || x.dim() == 2, "scan: packed x should be [R, I], got ", x.sizes());
  Shape n;
  n.I = x.size(-1);
  n.P = P;
  n.R = x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0);
  TORCH_CHECK(in.w_hh[0].dim() == 2, "scan: w_hh should be [G*H, Q], got ", in.w_hh[0].sizes());
  n.H = in.w_hh[0].size(0) / G;
  n.projected = !in.w_hr.empty();
  n.Q = n.projected ? in.w_hr[0].size(0) : n.H;
  auto all = [&](TensorList tensors, const char* name, at::IntArrayRef size, bool optional) {
    TORCH_CHECK((optional && tensors.empty()) || static_cast<int64_t>(tensors.size()) == P,
                "scan: ", name, " should hold one tensor per scan, ", P, ", got ", tensors.size());
    for (const Tensor& each : tensors) {
      TORCH_CHECK(each.sizes() == size, "scan: ", name, " should be ", size, ", got ",
                  each.sizes());
      TORCH_CHECK(each.scalar_type() == x.scalar_type(), "scan: ", name, " is ", each.scalar_type(),
                  " but x is ", x.scalar_type());
      TORCH_CHECK(each.device() == x.device(), "scan: ", name, " is on ", each.device(),
                  " but x is on ", x.device());
    }
  };
  all(in.w_ih, "w_ih", {G * n.H, n.I}, false);
  all(in.w_hh, "w_hh", {G * n.H, n.Q}, false);
  all(in.b_ih, "b_ih", {G * n.H}, true);
  all(in.b_hh, "b_hh", {G * n.H}, true);
  all(in.w_hr, "w_hr", {n.Q, n.H}, true);
  if (in.batch_sizes) {
    const Tensor& sizes = *in.batch_sizes;
    TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.is_cpu(),
                "scan: batch_sizes should be int64 [T] on the CPU, got ", sizes.scalar_type(), " ",
                sizes.sizes(), " on ", sizes.device());
    TORCH_CHECK(!in.s0.empty() && in.s0[0].dim() == 3, "scan: packed x needs s0");
    n.T = sizes.size(0);
    n.B = in.s0[0].size(1);
  } else {
    n.T = x.dim() == 3 ? x.size(0) : 1;
    n.B = x.dim() == 3 ? x.size(1) : x.size(0);
  }
  TORCH_CHECK(in.s0.empty() || static_cast<int64_t>(in.s0.size()) == cell.states,
              "scan: s0 should hold ", cell.states, " states, got ", in.s0.size());
  for (size_t s = 0; s < in.s0.size(); ++s) {
    const Tensor& each = in.s0[s];
    TORCH_CHECK(
        each.dim() == 3 && each.size(0) == P && each.size(1) == n.B && each.size(2) == n.width(s),
        "scan: state ", s, " should be [", P, ", ", n.B, ", ", n.width(s), "], got ", each.sizes());
    TORCH_CHECK(each.scalar_type() == x.scalar_type() && each.device() == x.device(),
                "scan: state ", s, " is ", each.scalar_type(), " on ", each.device(), " but x is ",
                x.scalar_type(), " on ", x.device());
  }
  if (in.lengths)
    TORCH_CHECK(in.lengths->dim() == 1 && in.lengths->size(0) == n.B &&
                    in.lengths->scalar_type() == at::kLong,
                "scan: lengths should be int64 [", n.B, "], got ", in.lengths->scalar_type(), " ",
                in.lengths->sizes());
  if (in.resets)
    TORCH_CHECK(in.resets->scalar_type() == at::kBool &&
                    in.resets->sizes() == x.sizes().slice(0, x.dim() - 1),
                "scan: resets should be bool with x's shape but for the last dimension, got ",
                in.resets->scalar_type(), " ", in.resets->sizes(), " for x ", x.sizes());
  return n;
}

// Owns what `Rows` points to.
struct RowTables {
  Rows rows;
  std::vector<int64_t> live, compact, order;
  Tensor resets;

  RowTables(const Shape& n, const ScanInputs& in) {
    rows.steps = n.T;
    rows.batch = n.B;
    if (in.batch_sizes) {
      const Tensor sizes = in.batch_sizes->contiguous();
      const int64_t* size = sizes.const_data_ptr<int64_t>();
      live.assign(size, size + n.T);
    }
    if (in.lengths) {
      const Tensor lengths = in.lengths->to(at::kCPU).contiguous();
      const int64_t* length = lengths.const_data_ptr<int64_t>();
      order.resize(n.B);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return length[a] > length[b]; });
      live.assign(n.T, 0);
      for (int64_t b = 0; b < n.B; ++b) {
        TORCH_CHECK(length[b] >= 0 && length[b] <= n.T, "scan: lengths should be in [0, ", n.T,
                    "], got ", length[b]);
        if (length[b] > 0) ++live[length[b] - 1];
      }
      for (int64_t t = n.T - 2; t >= 0; --t) live[t] += live[t + 1];
      rows.order = order.data();
    }
    if (in.batch_sizes || in.lengths) {
      compact.resize(n.T + 1, 0);
      for (int64_t t = 0; t < n.T; ++t) {
        TORCH_CHECK(live[t] >= 0 && live[t] <= (t ? live[t - 1] : n.B),
                    "scan: batch_sizes should not increase, nor exceed the batch ", n.B, ", got ",
                    live[t], " at step ", t);
        compact[t + 1] = compact[t] + live[t];
      }
      TORCH_CHECK(in.lengths || compact[n.T] == n.R, "scan: batch_sizes add up to ", compact[n.T],
                  " but x has ", n.R, " rows");
      rows.live_slots = live.data();
      rows.compact = compact.data();
    }
    if (in.resets) {
      resets = in.resets->contiguous();
      rows.resets = reinterpret_cast<const uint8_t*>(resets.const_data_ptr<bool>());
    }
  }

  int64_t live_rows() const { return compact.empty() ? rows.steps * rows.batch : compact.back(); }

  // The first of the steps up to `end` that have at most `most` live rows, in either direction;
  // at least one step.
  int64_t stretch_begin(int64_t end, int64_t most) const {
    int64_t begin = end, forward = 0, reverse = 0;
    while (begin > 0) {
      forward += rows.live(begin - 1);
      reverse += rows.live(rows.steps - begin);
      if (begin < end && std::max(forward, reverse) > most) break;
      --begin;
    }
    return begin;
  }
};

at::ScalarType compute_type(at::ScalarType stored) {
  return stored == at::kDouble ? at::kDouble : at::kFloat;
}

Storage storage_of(at::ScalarType type) {
  return type == at::kBFloat16 ? Storage::kBfloat16
         : type == at::kHalf   ? Storage::kFloat16
                               : Storage::kSame;
}

// Tensors kept alive while kernels read them.
std::vector<Tensor> as_computed(TensorList tensors, at::ScalarType compute) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& each : tensors) out.push_back(each.to(compute).contiguous());
  return out;
}

Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

std::vector<Tensor> contiguous(TensorList tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& each : tensors) out.push_back(each.contiguous());
  return out;
}

// Owns what `Scan` points to, for either sweep.
struct Operands {
  std::vector<Tensor> w_ih, w_hh, b_ih, b_hh, w_hr, s0;
  std::vector<Lane> lanes;

  Operands(const ScanInputs& in, const Shape& n, at::ScalarType compute)
      : s0(contiguous(in.s0)), lanes(n.P) {
    for (int64_t p = 0; p < n.P; ++p) {
      Lane& lane = lanes[p];
      lane.reverse = in.reverse >> p & 1;
      for (size_t s = 0; s < s0.size(); ++s)
        lane.s0[s] = static_cast<const char*>(s0[s].const_data_ptr()) +
                     p * n.B * n.width(s) * s0[s].itemsize();
    }
    if (!in.packed.empty()) {
      for (int64_t p = 0; p < n.P; ++p) lanes[p].packed = in.packed[p].const_data_ptr();
      return;
    }
    w_ih = as_computed(in.w_ih, compute);
    w_hh = as_computed(in.w_hh, compute);
    b_ih = as_computed(in.b_ih, compute);
    b_hh = as_computed(in.b_hh, compute);
    w_hr = as_computed(in.w_hr, compute);
    for (int64_t p = 0; p < n.P; ++p) {
      Lane& lane = lanes[p];
      lane.w_ih = w_ih[p].const_data_ptr();
      lane.w_hh = w_hh[p].const_data_ptr();
      lane.b_ih = b_ih.empty() ? nullptr : b_ih[p].const_data_ptr();
      lane.b_hh = b_hh.empty() ? nullptr : b_hh[p].const_data_ptr();
      lane.w_hr = w_hr.empty() ? nullptr : w_hr[p].const_data_ptr();
    }
  }

  void fill(Scan& scan, const Shape& n, const RowTables& tables, Storage storage) const {
    scan.rows = tables.rows;
    scan.inputs = n.I;
    scan.hidden = n.H;
    scan.recurrent = n.Q;
    scan.projected = n.projected;
    scan.lanes = static_cast<int32_t>(n.P);
    scan.storage = storage;
    scan.lane = lanes.data();
  }
};

Problem problem_of(const ScanInputs& in, const Shape& n, int64_t rows, bool tape, bool backward) {
  return {in.cell,
          n.T,
          n.B,
          rows,
          n.I,
          n.H,
          n.P,
          in.x.scalar_type(),
          in.x.device().type(),
          tape,
          backward,
          n.projected,
          !in.packed.empty()};
}

void check_packed(const CellFacts& cell, const ScanInputs& in, const Shape& n,
                  at::ScalarType compute) {
  if (in.packed.empty()) return;
  TORCH_CHECK(static_cast<int64_t>(in.packed.size()) == n.P,
              "scan: packed should hold one tensor per scan, ", n.P, ", got ", in.packed.size());
  const int64_t bytes =
      cell.compiled->packed_bytes[compute == at::kDouble]({n.I, n.H, n.Q, n.projected});
  for (const Tensor& each : in.packed)
    TORCH_CHECK(each.is_cpu() && each.scalar_type() == compute && each.is_contiguous() &&
                    static_cast<int64_t>(each.nbytes()) == bytes,
                "scan: packed weights of ", each.nbytes(), " bytes, ", each.scalar_type(),
                ", do not fit weights that take ", bytes, " bytes of ", compute);
}

void out_of_memory(bool done) {
  TORCH_CHECK_WITH(OutOfMemoryError, done, "fastrnn: no memory for packed weights and one chunk");
}

}  // namespace

Tensor pack(const std::string& name, const Tensor& w_ih, const Tensor& w_hh,
            const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
            const std::optional<Tensor>& w_hr) {
  const CellFacts& cell = known_cell(name);
  const auto list = [](const std::optional<Tensor>& each) {
    return each ? std::vector<Tensor>{*each} : std::vector<Tensor>{};
  };
  const auto bi = list(b_ih), bh = list(b_hh), hr = list(w_hr);
  const std::optional<Tensor> none;
  const Tensor x = at::empty({0, 1, w_ih.size(-1)}, w_ih.options());
  const ScanInputs in{name, x, w_ih, w_hh, bi, bh, hr, {}, none, none, none, 0};
  const Shape n = checked_shape(cell, in);
  TORCH_CHECK(x.is_cpu(), "pack: the weights should be on the CPU, are on ", x.device());
  TORCH_CHECK(!n.projected || cell.projectable(), "pack: cell ", name, " cannot be projected");
  const at::ScalarType compute = compute_type(x.scalar_type());
  const Operands operands(in, n, compute);
  const LaneSizes sizes{n.I, n.H, n.Q, n.projected};
  const bool in_double = compute == at::kDouble;
  const int64_t numbers = cell.compiled->packed_bytes[in_double](sizes) / at::elementSize(compute);
  const Tensor packed = at::empty({numbers}, x.options().dtype(compute));
  cell.compiled->pack[in_double](sizes, operands.lanes[0], packed.mutable_data_ptr());
  return packed;
}

int64_t fingerprint(TensorList tensors) {
  constexpr int64_t kSamples = 8;
  uint64_t hash = 14695981039346656037u;
  const auto add = [&](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  for (const Tensor& each : tensors) {
    const auto* impl = each.unsafeGetTensorImpl();
    add(each.is_inference() ? 0 : impl->version_counter().current_version());
    const char* data = static_cast<const char*>(each.const_data_ptr());
    add(reinterpret_cast<uintptr_t>(data));
    if (!each.is_cpu() || !each.is_non_overlapping_and_dense()) continue;
    const int64_t size = static_cast<int64_t>(each.itemsize()), last = each.numel() - 1;
    for (int64_t k = 0; k < kSamples && last >= 0; ++k) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + last * k / (kSamples - 1) * size, std::min<int64_t>(size, 8));
      add(bits);
    }
  }
  return static_cast<int64_t>(hash);
}

ScanOutputs scan_cpu(const ScanInputs& in, bool tape) {
  const CellFacts& cell = known_cell(in.cell);
  const Shape n = checked_shape(cell, in);
  const RowTables tables(n, in);
  const Choice& choice = choose(cell, problem_of(in, n, tables.live_rows(), tape, false));
  if (choice.kernel != "cpu") return python_forward(choice.kernel, in, tape);

  const at::ScalarType compute = compute_type(in.x.scalar_type());
  const Storage storage = storage_of(in.x.scalar_type());
  check_packed(cell, in, n, compute);
  const Operands operands(in, n, compute);
  const Tensor x = with_unit_stride(in.x);
  const at::ScalarType stored = x.scalar_type();

  auto y_size = x.sizes().vec();
  y_size.back() = n.P * n.Q;
  ScanOutputs out;
  auto& [y, states, kept] = out;
  y = in.lengths ? fresh_zeros(y_size, stored) : fresh(y_size, stored);
  kept = fresh({tape ? n.R : 0, n.P, cell.tape_width(n.projected), n.H}, stored);
  if (in.lengths && tape) kept.zero_();
  std::vector<void*> finals(n.P * cell.states);
  for (int32_t s = 0; s < cell.states; ++s) {
    states.push_back(fresh({n.P, n.B, n.width(s)}, stored));
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
  args.tape = tape ? kept.mutable_data_ptr() : nullptr;
  args.final_states = finals.data();
  out_of_memory(cell.compiled->forward[compute == at::kDouble](args, choice.cpu));
  return out;
}

std::vector<Tensor> scan_backward_cpu(const ScanInputs& in, const Incoming& grads, const Tensor& y,
                                      const Tensor& tape, const Needs& needs) {
  const CellFacts& cell = known_cell(in.cell);
  const Shape n = checked_shape(cell, in);
  const RowTables tables(n, in);
  const Choice& choice = choose(cell, problem_of(in, n, tables.live_rows(), true, true));
  if (choice.kernel != "cpu") return python_backward(choice.kernel, in, grads, y, tape, needs);

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
    const int64_t width = s ? n.H : n.Q;
    TORCH_CHECK(
        !each.defined() || (each.sizes() == at::IntArrayRef({n.P, n.B, width}) && each.is_cpu()),
        "scan_backward: the gradient of state ", s, " should be [", n.P, ", ", n.B, ", ", width,
        "] on the CPU, got ", each.sizes(), " on ", each.device());
  }
  const Operands operands(in, n, compute);
  const int64_t S = cell.states, depth = cell.gates * n.H;
  const bool tied = cell.all_tied();
  const Tensor y_rows = y.contiguous(), tape_rows = tape.contiguous();
  const Tensor dy = grads.dy.defined() ? grads.dy.to(stored).contiguous() : Tensor();

  // Gradients of the states, carried from stretch to stretch in the compute type.
  std::vector<Tensor> ds(S);
  std::vector<void*> carried(n.P * S);
  for (int64_t s = 0; s < S; ++s) {
    const Tensor& last = grads.dstates[s];
    ds[s] = last.defined() ? last.to(compute, false, true).contiguous()
                           : fresh_zeros({n.P, n.B, n.width(s)}, compute);
    for (int64_t p = 0; p < n.P; ++p)
      carried[p * S + s] = static_cast<char*>(ds[s].mutable_data_ptr()) +
                           p * n.B * n.width(s) * static_cast<int64_t>(ds[s].itemsize());
  }

  const CpuPlan plan = choice.cpu;
  const int64_t most = std::min(std::max(plan.chunk_rows, n.B), tables.live_rows());
  BackwardArgs args;
  operands.fill(args, n, tables, storage_of(stored));
  const Workspace workspace(
      compute, {n.P * most * depth, tied ? 0 : n.P * most * depth, n.P * most * n.Q,
                n.projected ? n.P * most * n.Q : 0, packed_for_backward(args, cell.gates),
                needs[kNeedX] ? n.P * packed_width(n.I) * depth : 0});
  const auto lanes_of = [&](int part, int64_t width) {
    std::vector<void*> at(n.P);
    for (int64_t p = 0; p < n.P; ++p) at[p] = workspace.at(part, p * most * width);
    return at;
  };
  const auto dv_lanes = lanes_of(0, depth), du_lanes = lanes_of(tied ? 0 : 1, depth),
             previous_lanes = lanes_of(2, n.Q), dh_lanes = lanes_of(3, n.Q);
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
  const auto db_hh = zeros(bias && !tied, out.b_hh, {depth});
  const auto or_null = [](const std::vector<void*>& v) { return v.empty() ? nullptr : v.data(); };

  args.dy = dy.defined() ? dy.const_data_ptr() : nullptr;
  args.y = y_rows.const_data_ptr();
  args.tape = tape_rows.const_data_ptr();
  args.ds = carried.data();
  args.du = du_lanes.data();
  args.dv = dv_lanes.data();
  args.previous = previous_lanes.data();
  args.dh = n.projected ? dh_lanes.data() : nullptr;

  const Tensor x = with_unit_stride(in.x);
  GradientArgs rest;
  rest.rows = args.rows;
  rest.inputs = n.I;
  rest.hidden = n.H;
  rest.recurrent = n.Q;
  rest.depth = depth;
  rest.lanes = args.lanes;
  rest.storage = args.storage;
  rest.lane = args.lane;
  rest.x = x.const_data_ptr();
  rest.x_row = x.stride(-2);
  rest.x_step = x.dim() == 3 ? x.stride(0) : 0;
  rest.du = du_lanes.data();
  rest.dv = dv_lanes.data();
  rest.previous = previous_lanes.data();
  rest.dh = dh_lanes.data();
  rest.tape = tape_rows.const_data_ptr();
  rest.tape_width = tape_rows.size(2);
  rest.dw_hr = or_null(dw_hr);
  rest.dw_ih = or_null(dw_ih);
  rest.dw_hh = or_null(dw_hh);
  rest.db_ih = or_null(db_ih);
  rest.db_hh = or_null(db_hh);
  rest.dx = needs[kNeedX] ? out.x.mutable_data_ptr() : nullptr;

  int32_t packed_for = 0;
  args.packed = workspace.at(4);
  args.packed_for = &packed_for;
  rest.packed = workspace.at(5);

  const bool in_double = compute == at::kDouble;
  for (int64_t end = n.T, begin; end > 0; end = begin) {
    begin = tables.stretch_begin(end, most);
    args.begin = rest.begin = begin;
    args.end = rest.end = end;
    out_of_memory(cell.compiled->backward[in_double](args, plan));
    out_of_memory(run_gradients(in_double, rest, plan));
  }

  if (bias && tied)
    for (const Tensor& each : out.b_ih) out.b_hh.push_back(each.clone());
  if (needs[kNeedX]) out.x = out.x.view(in.x.sizes()).to(stored);
  for (auto* group : {&out.w_ih, &out.w_hh, &out.b_ih, &out.b_hh, &out.w_hr})
    for (Tensor& each : *group) each = each.to(stored);
  if (needs[kNeedStates] && !in.s0.empty())
    for (const Tensor& each : ds) out.s0.push_back(each.to(stored));
  return out.flat(needs);
}

}  // namespace fastrnn
