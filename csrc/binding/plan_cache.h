// The cache of the CPU kernel's plans: Python makes one for each problem.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "cpu/contract.h"
#include "cpu/registry.h"

namespace fastrnn {

// A call on tensors on a CPU, with the fields of fastrnn/plan's Problem.
struct Problem {
  std::string_view cell;
  int64_t steps, batch, rows, inputs, hidden, recurrences;
  at::ScalarType dtype;
  bool tape, backward, projected, frozen;
  Format format;
};

// The CPU kernel's plan for a problem, or nothing if another kernel runs it. It comes from
// fastrnn/plan the first time, then from a cache of the thread.
std::optional<CpuPlan> cpu_plan(const CellFacts& cell, const Problem& problem);
// Forgets all plans, in every thread.
void forget_plans();
// How often they were forgotten, for a cache that is not in C++.
int64_t plans_forgotten();

}  // namespace fastrnn
