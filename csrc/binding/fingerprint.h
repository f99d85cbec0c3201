// How a frozen layer notices that its weights are no longer those that were packed.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastrnn {

// What tells whether tensors are still those they were: int64, see the source.
at::Tensor fingerprint(at::TensorList tensors);
// Whether they are, for a call of that many rows; it reads no more of them than such a call pays
// for, so what was written past torch's count of changes is found within kRowsToReadAll rows.
bool unchanged(at::TensorList tensors, const at::Tensor& fingerprint, int64_t rows);

}  // namespace fastrnn
