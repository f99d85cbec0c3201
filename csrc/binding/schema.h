// The parameters of the operator, spelled once for all kernels that are registered for it.
#pragma once

#include "binding/call.h"

#define FASTRNN_SCAN_PARAMETERS                                                             \
  std::string_view cell, const Tensor &x, TensorList w_ih, TensorList w_hh,                 \
      const OptionalList &b_ih, const OptionalList &b_hh, const OptionalList &w_hr,         \
      const OptionalList &params, const OptionalList &s0, const OptionalList &reset_states, \
      const std::optional<Tensor>&batch_sizes, const std::optional<Tensor>&lengths,         \
      const std::optional<Tensor>&resets, const std::optional<Tensor>&noise, int64_t reverse
#define FASTRNN_SCAN_INPUTS                                                                \
  ScanInputs {                                                                             \
    cell, x, w_ih, w_hh, or_empty(b_ih), or_empty(b_hh), or_empty(w_hr), or_empty(params), \
        or_empty(s0), or_empty(reset_states), batch_sizes, lengths, resets, noise, reverse \
  }
#define FASTRNN_PACKED_PARAMETERS \
  FASTRNN_SCAN_PARAMETERS, TensorList packed, const Tensor &expected, std::string_view format
#define FASTRNN_BACKWARD_PARAMETERS                                                           \
  std::string_view cell, const std::optional<Tensor>&dy,                                      \
      const c10::List<std::optional<Tensor>>&dstates, const std::optional<Tensor>&dsteps,     \
      const Tensor &x, TensorList w_ih, TensorList w_hh, const OptionalList &b_ih,            \
      const OptionalList &b_hh, const OptionalList &w_hr, const OptionalList &params,         \
      const OptionalList &s0, const OptionalList &reset_states,                               \
      const std::optional<Tensor>&batch_sizes, const std::optional<Tensor>&lengths,           \
      const std::optional<Tensor>&resets, const std::optional<Tensor>&noise, int64_t reverse, \
      const Tensor &y, const Tensor &tape, Needs needs
