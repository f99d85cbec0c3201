// How a frozen layer notices that its weights were changed after they were packed.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn {

// A fingerprint, an int64 tensor, tells whether tensors were changed; fingerprint.cpp says how.
at::Tensor fingerprint(at::TensorList tensors);
// Whether tensors are unchanged, for a call with that many rows. It reads a part of them that grows
// with the rows, so it finds a change past the version counters (`.data`, NumPy) within
// kRowsToReadAll rows.
bool unchanged(at::TensorList tensors, const at::Tensor& fingerprint, int64_t rows);

// A hash of a few numbers of a tensor, from the first to the last: it changes if all numbers do. It
// is 0 for every tensor without memory on a CPU.
uint64_t samples(const at::Tensor& tensor);

}  // namespace fastrnn
