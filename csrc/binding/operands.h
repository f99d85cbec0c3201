// The operands of a call for the CPU kernel: checked, in its dtypes, with tables of rows.
#pragma once

#include <ATen/Functions.h>
#include <c10/util/DimVector.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "binding/call.h"

namespace fastrnn {

struct Shape {
  int64_t T, B, R, I, H, Q, P;
  bool projected;
  bool step;  // x is [B, I], one step of one recurrence, and its states are [B, *]

  int64_t width(int64_t state) const { return state ? H : Q; }
  c10::DimVector state_size(int64_t state) const {
    c10::DimVector size{P, B, width(state)};
    if (step) size.erase(size.begin());
    return size;
  }
};

// The dispatcher handles special tensors among x and the weights, but not those in optional lists;
// these functions refuse or resolve them.
inline void check_plain(const Tensor& tensor, const char* name) {
  constexpr c10::DispatchKeySet unusual{c10::DispatchKey::Python, c10::DispatchKey::ZeroTensor,
                                        c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::FuncTorchGradWrapper};
  TORCH_CHECK(!tensor.key_set().has_any(unusual), "scan: ", name,
              " is a tensor subclass, transformed or a zero tensor, but x and the weights are "
              "not; convert it, or them");
}
inline Tensor resolved(const Tensor& tensor) {
  return tensor.is_neg() ? tensor.resolve_neg() : tensor;
}

// Calls f(first row, rows) for each learned parameter of a cell: one row of numbers per unit, or
// one for each gate.
template <class F>
void for_each_param(const CellFacts& cell, const F& f) {
  for (int64_t k = 0; k < cell.params;) {
    const int64_t rows = cell.gate_params >> k & 1 ? cell.gates : 1;
    f(k, rows);
    k += rows;
  }
}

// A tensor for each learned parameter of the cell, those of a recurrence side by side.
inline void check_params(const CellFacts& cell, const ScanInputs& in, const Shape& n) {
  c10::SmallVector<int64_t, kMaxParams> sizes;
  for_each_param(
      cell, [&](int64_t k, int64_t rows) { sizes.push_back(cell.is_shared(k) ? 1 : rows * n.H); });
  const int64_t count = sizes.size();
  TORCH_CHECK(static_cast<int64_t>(in.params.size()) == n.P * count, "scan: params should hold ",
              count, " tensors per recurrence, got ", in.params.size(), " for ", n.P);
  for (size_t i = 0; i < in.params.size(); ++i) {
    const Tensor& each = in.params[i];
    const int64_t k = i % count, size = sizes[k];
    check_plain(each, "params");
    TORCH_CHECK(each.dim() == 1 && each.size(0) == size, "scan: parameter ", k, " of cell ",
                cell.name, " should be [", size, "], got ", each.sizes());
    TORCH_CHECK(each.scalar_type() == in.x.scalar_type() && each.device() == in.x.device(),
                "scan: parameter ", k, " is ", each.scalar_type(), " on ", each.device(),
                " but x is ", in.x.scalar_type(), " on ", in.x.device());
  }
}

// A seed, the thresholds of the cell's draws, and perhaps the index of each sequence.
inline void check_noise(const CellFacts& cell, const ScanInputs& in, const Shape& n) {
  TORCH_CHECK(in.noise.has_value() == (cell.draws > 0), "scan: cell ", cell.name, " draws ",
              cell.draws, " random numbers for each unit, and noise is ",
              in.noise ? "given" : "missing");
  if (!in.noise) return;
  const Tensor& noise = *in.noise;
  check_plain(noise, "noise");
  const int64_t least = 1 + cell.draws;
  TORCH_CHECK(noise.dim() == 1 && noise.scalar_type() == at::kLong && noise.is_cpu() &&
                  (noise.size(0) == least || noise.size(0) == least + n.B),
              "scan: noise should be int64 [", least, "] or [", least + n.B, "] on the CPU, got ",
              noise.scalar_type(), " ", noise.sizes(), " on ", noise.device());
}

// Checks all that memory safety needs. Modules check before, with torch.nn's messages.
inline Shape checked_shape(const CellFacts& cell, const ScanInputs& in) {
  const Tensor& x = in.x;
  const int64_t Gu = cell.input_gates, Gv = cell.recurrent_gates, P = in.w_hh.size();
  TORCH_CHECK(
      x.dim() == 3 || (x.dim() == 2 && !in.lengths),
      "scan: x should be [T, B, I], packed [R, I] with batch_sizes, or [B, I] for one step, "
      "got ",
      x.sizes());
  check_recurrences(in);
  TORCH_CHECK(!in.batch_sizes || x.dim() == 2, "scan: packed x should be [R, I], got ", x.sizes());
  Shape n;
  n.step = one_step(in);
  TORCH_CHECK(!n.step || P == 1, "scan: x [B, I] is one step of one recurrence, got ", P,
              " sets of weights; pass x as [1, B, I]");
  n.I = x.size(-1);
  n.P = P;
  n.R = x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0);
  TORCH_CHECK(static_cast<int64_t>(in.w_ih.size()) == P,
              "scan: w_ih should hold one tensor per recurrence, ", P, ", got ", in.w_ih.size());
  TORCH_CHECK(in.w_ih[0].dim() == 2, "scan: w_ih should be [G*H, I], got ", in.w_ih[0].sizes());
  n.H = in.w_ih[0].size(0) / Gu;
  n.projected = !in.w_hr.empty();
  n.Q = n.projected ? in.w_hr[0].size(0) : n.H;
  // A layer that has its weights only in a format of its own passes those, for their sizes.
  const bool only_sizes = !in.packed.empty();
  auto all = [&](TensorList tensors, const char* name, at::IntArrayRef size, bool optional) {
    const bool matrix = size.size() == 2;
    TORCH_CHECK((optional && tensors.empty()) || static_cast<int64_t>(tensors.size()) == P,
                "scan: ", name, " should hold one tensor per recurrence, ", P, ", got ",
                tensors.size());
    for (const Tensor& tensor : tensors) {
      check_plain(tensor, name);
      TORCH_CHECK(tensor.sizes() == size, "scan: ", name, " should be ", size, ", got ",
                  tensor.sizes());
      TORCH_CHECK(tensor.scalar_type() == x.scalar_type() || (matrix && only_sizes), "scan: ", name,
                  " is ", tensor.scalar_type(), " but x is ", x.scalar_type());
      TORCH_CHECK(tensor.device() == x.device(), "scan: ", name, " is on ", tensor.device(),
                  " but x is on ", x.device());
    }
  };
  all(in.w_ih, "w_ih", {Gu * n.H, n.I}, false);
  all(in.w_hh, "w_hh", {Gv * n.H, n.Q}, false);
  all(in.b_ih, "b_ih", {Gu * n.H}, true);
  all(in.b_hh, "b_hh", {Gv * n.H}, true);
  all(in.w_hr, "w_hr", {n.Q, n.H}, true);
  check_params(cell, in, n);
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
  const auto states = [&](TensorList given, const char* name) {
    TORCH_CHECK(given.empty() || static_cast<int64_t>(given.size()) == cell.states, "scan: ", name,
                " should hold ", cell.states, " states, got ", given.size());
    for (size_t s = 0; s < given.size(); ++s) {
      const Tensor& state = given[s];
      check_plain(state, name);
      TORCH_CHECK(state.sizes() == n.state_size(s), "scan: state ", s, " of ", name, " should be ",
                  at::IntArrayRef(n.state_size(s)), ", got ", state.sizes());
      TORCH_CHECK(state.scalar_type() == x.scalar_type() && state.device() == x.device(),
                  "scan: state ", s, " of ", name, " is ", state.scalar_type(), " on ",
                  state.device(), " but x is ", x.scalar_type(), " on ", x.device());
    }
  };
  states(in.s0, "s0");
  states(in.reset_states, "reset_states");
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
  check_noise(cell, in, n);
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
      rows.live_sequences = live.data();
      rows.compact = compact.data();
    }
    if (in.resets) {
      resets = in.resets->contiguous();
      rows.resets = reinterpret_cast<const uint8_t*>(resets.const_data_ptr<bool>());
    }
  }

  int64_t live_rows() const { return compact.empty() ? rows.steps * rows.batch : compact.back(); }

  // The first step of the chunk that ends before `end`: it has at least one step, and at most
  // `most` live rows, in either direction.
  int64_t chunk_begin(int64_t end, int64_t most) const {
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

// A checked call of a cell on tensors on a CPU.
struct Call {
  const CellFacts& cell;
  const ScanInputs& in;
  const Shape n;
  const RowTables tables;

  Call(const CellFacts& cell, const ScanInputs& in)
      : cell(cell), in(in), n(checked_shape(cell, in)), tables(n, in) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

inline at::ScalarType compute_type(at::ScalarType stored) {
  return stored == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::ScalarType compute_type(Format format) {
  return format == Format::kDouble ? at::kDouble : at::kFloat;
}

// The format of a float kernel for tensors of that dtype.
inline Format plain_format(at::ScalarType stored) {
  return stored == at::kDouble ? Format::kDouble : Format::kFloat;
}
// The format of the forward pass. It depends on the dtype and the processor alone, so that a
// sequence's numbers do, too.
inline Format format_of(at::ScalarType stored) {
  return stored == at::kBFloat16 && has_format(Format::kBfloat16) ? Format::kBfloat16
                                                                  : plain_format(stored);
}
inline Format format_of(const ScanInputs& in) {
  return in.packed.empty() ? format_of(in.x.scalar_type()) : in.format;
}

inline Storage storage_of(at::ScalarType type) {
  return type == at::kBFloat16 ? Storage::kBfloat16
         : type == at::kHalf   ? Storage::kFloat16
                               : Storage::kSame;
}

// `tensor.to(type)`, without the dispatcher where there is nothing to convert.
inline Tensor converted(const Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// Contiguous tensors in the compute type; the caller keeps them alive while kernels read them.
inline std::vector<Tensor> as_computed(TensorList tensors, at::ScalarType compute) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& tensor : tensors)
    out.push_back(converted(resolved(tensor), compute).contiguous());
  return out;
}

// Weights of a format, in contiguous rows of whole words.
inline std::vector<Tensor> in_words(TensorList tensors, at::ScalarType type, int64_t group) {
  std::vector<Tensor> out = as_computed(tensors, type);
  for (Tensor& tensor : out)
    if (const int64_t rest = tensor.size(1) % group)
      tensor = at::constant_pad_nd(tensor, {0, group - rest});
  return out;
}

// The parameters of every recurrence as one [rows, H]; a shared one is repeated.
inline std::vector<Tensor> side_by_side(TensorList params, const CellFacts& cell, int64_t hidden,
                                        at::ScalarType compute) {
  std::vector<Tensor> out;
  for (size_t next = 0; next < params.size();) {
    Tensor all = at::empty({cell.params, hidden}, params[next].options().dtype(compute));
    for_each_param(cell, [&](int64_t k, int64_t rows) {
      const Tensor each = resolved(params[next++]);
      if (each.scalar_type() == compute && each.is_contiguous() && each.numel() == rows * hidden &&
          each.nbytes() > 0)
        std::memcpy(static_cast<char*>(all.mutable_data_ptr()) + k * hidden * all.itemsize(),
                    each.const_data_ptr(), each.nbytes());
      else
        all.narrow(0, k, rows).copy_(rows > 1 ? each.view({rows, hidden}) : each);
    });
    out.push_back(std::move(all));
  }
  return out;
}

inline Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

inline std::vector<Tensor> contiguous(TensorList tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& tensor : tensors) out.push_back(resolved(tensor).contiguous());
  return out;
}

// Owns what `Scan` points to, for either sweep.
struct Operands {
  std::vector<Tensor> w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states;
  std::vector<Recurrence> recurrences;
  Tensor numbers;
  std::optional<Noise> noise;

  Operands(const CellFacts& cell, const ScanInputs& in, const Shape& n, Format format)
      : s0(contiguous(in.s0)), reset_states(contiguous(in.reset_states)), recurrences(n.P) {
    for (int64_t p = 0; p < n.P; ++p) {
      Recurrence& recurrence = recurrences[p];
      recurrence.reverse = in.reverse >> p & 1;
      const auto states = [&](const std::vector<Tensor>& from, const void** to) {
        for (size_t s = 0; s < from.size(); ++s)
          to[s] = static_cast<const char*>(from[s].const_data_ptr()) +
                  p * n.B * n.width(s) * from[s].itemsize();
      };
      states(s0, recurrence.s0);
      states(reset_states, recurrence.reset);
    }
    if (in.noise) {
      numbers = in.noise->contiguous();
      const int64_t* at = numbers.const_data_ptr<int64_t>();
      const bool ordered = numbers.size(0) > 1 + cell.draws;
      noise = {static_cast<uint64_t>(at[0]), at + 1, ordered ? at + 1 + cell.draws : nullptr};
    }
    if (!in.packed.empty()) {
      for (int64_t p = 0; p < n.P; ++p) recurrences[p].prepacked = in.packed[p].const_data_ptr();
      return;
    }
    const at::ScalarType compute = compute_type(format);
    const auto matrices = [&](TensorList tensors) {
      if (is_scaled(format)) return in_words(tensors, at::kChar, 4);
      if (format == Format::kBfloat16) return in_words(tensors, at::kBFloat16, 2);
      return as_computed(tensors, compute);
    };
    w_ih = matrices(in.w_ih);
    w_hh = matrices(in.w_hh);
    b_ih = as_computed(in.b_ih, compute);
    b_hh = as_computed(in.b_hh, compute);
    w_hr = matrices(in.w_hr);
    params = side_by_side(in.params, cell, n.H, compute);
    for (int64_t p = 0; p < n.P; ++p) {
      Recurrence& recurrence = recurrences[p];
      recurrence.w_ih = w_ih[p].const_data_ptr();
      recurrence.w_hh = w_hh[p].const_data_ptr();
      recurrence.b_ih = b_ih.empty() ? nullptr : b_ih[p].const_data_ptr();
      recurrence.b_hh = b_hh.empty() ? nullptr : b_hh[p].const_data_ptr();
      recurrence.w_hr = w_hr.empty() ? nullptr : w_hr[p].const_data_ptr();
      recurrence.params = params.empty() ? nullptr : params[p].const_data_ptr();
    }
  }

  void fill(Scan& scan, const Shape& n, const RowTables& tables, Storage storage) const {
    scan.rows = tables.rows;
    scan.inputs = n.I;
    scan.hidden = n.H;
    scan.recurrent = n.Q;
    scan.projected = n.projected;
    scan.recurrences = static_cast<int32_t>(n.P);
    scan.storage = storage;
    scan.recurrence = recurrences.data();
    scan.noise = noise ? &*noise : nullptr;
  }
};

}  // namespace fastrnn
