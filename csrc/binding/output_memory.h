// Memory for outputs of the CPU kernel.
#pragma once

#include "binding/call.h"

namespace fastrnn {

// An uninitialised tensor: at::empty without the dispatcher, which takes longer than a small tensor
// is worth, and from pages that cost little to touch first.
Tensor fresh(at::IntArrayRef size, at::ScalarType type);
Tensor fresh_zeros(at::IntArrayRef size, at::ScalarType type);

// The same for a tape. The C library returns blocks from 32 MiB on to the system as soon as they
// are freed, and each training step would pay for all of their pages again. So they are handed on
// to the next tape of nearly their size; at most 256 MiB wait for one.
Tensor tape_memory(at::IntArrayRef size, at::ScalarType type);

}  // namespace fastrnn
