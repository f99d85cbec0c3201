// Autocast of `scan`.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "binding/op.h"
#include "binding/schema.h"

namespace fastrnn {

at::ScalarType autocast_dtype(std::string_view cell, const Tensor& x, TensorList s0) {
  const auto device = x.device().type();
  const bool in_float = (s0.empty() ? x : s0[0]).scalar_type() == at::kFloat;
  if (device == c10::DeviceType::CPU && cell == "gru" && in_float) return at::kFloat;
  return at::autocast::get_autocast_dtype(device);
}

namespace {

template <c10::DeviceType device, c10::DispatchKey key>
std::vector<Tensor> autocast(FASTRNN_SCAN_PARAMETERS, bool tape, bool recompute, bool steps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const ScanInputs in = FASTRNN_SCAN_INPUTS;
  const at::ScalarType type = autocast_dtype(cell, x, in.s0);
  auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(type, tensor, device); };
  auto cast_all = [&](TensorList list) {
    std::vector<Tensor> out;
    for (const Tensor& tensor : list) out.push_back(cast(tensor));
    return out;
  };
  const auto ih = cast_all(in.w_ih), hh = cast_all(in.w_hh), bi = cast_all(in.b_ih),
             bh = cast_all(in.b_hh), hr = cast_all(in.w_hr), p = cast_all(in.params),
             s = cast_all(in.s0), r = cast_all(in.reset_states);
  const Tensor cast_x = cast(x);
  Tensor states;
  ScanOutputs out = call_scan(
      {cell, cast_x, ih, hh, bi, bh, hr, p, s, r, batch_sizes, lengths, resets, noise, reverse},
      tape, recompute, steps ? &states : nullptr);
  return as_list(std::move(out), states);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) {
  m.impl("scan", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) {
  m.impl("scan", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace fastrnn
