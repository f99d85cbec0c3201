// Plans of the CPU kernel, asked of Python once for each problem and remembered.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "cpu/contract.h"
#include "cpu/registry.h"

namespace fastrnn {

// A call on tensors on a CPU, as fastrnn/plan's Problem.
struct Problem {
  std::string_view cell;
  int64_t steps, batch, rows, inputs, hidden, recurrences;
  at::ScalarType dtype;
  bool tape, backward, projected, frozen;
};

// The CPU kernel's plan for a problem, or nothing where another kernel runs it. Remembered per
// thread; asks fastrnn/plan the first time.
std::optional<CpuPlan> cpu_plan(const CellFacts& cell, const Problem& problem);
// Forgets all plans, in every thread.
void forget_plans();

}  // namespace fastrnn
