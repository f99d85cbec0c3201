// How a frozen layer notices that its weights are no longer those that were packed.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn {

// A fingerprint, int64, tells whether tensors are still those they were; the source says how.
at::Tensor fingerprint(at::TensorList tensors);
// Whether they are, for a call of that many rows. It reads no more than such a call pays for, and
// so finds a change past torch's count (`.data`, NumPy) within kRowsToReadAll rows.
bool unchanged(at::TensorList tensors, const at::Tensor& fingerprint, int64_t rows);

// A hash of some numbers of a tensor, from the first to the last: it changes where all are written.
// It is the same for every tensor without memory on a CPU.
uint64_t samples(const at::Tensor& tensor);

}  // namespace fastrnn
