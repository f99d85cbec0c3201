// Plans, asked of Python once for each problem and remembered.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "cpu/contract.h"
#include "cpu/registry.h"

namespace fastrnn {

// Numbers that decide a plan; fastrnn/plan's Problem, and the threads there are.
struct Problem {
  std::string_view cell;
  int64_t steps, batch, rows, inputs, hidden, lanes;
  at::ScalarType dtype;
  at::DeviceType device;
  bool tape, backward, projected, frozen;
};

struct Choice {
  std::string kernel;
  CpuPlan cpu;
};

// The plan for a problem, remembered per thread; asks fastrnn/plan the first time.
const Choice& choose(const CellFacts& cell, const Problem& problem);
// Forgets all plans, in every thread.
void forget_plans();

}  // namespace fastrnn
