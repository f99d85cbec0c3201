#include "binding/plan_cache.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>

#include "binding/callbacks.h"
#include "cpu/contention.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

std::atomic<int64_t> plans_epoch{0};

using PlanKey = std::tuple<const CellFacts*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                           at::ScalarType, bool, bool, bool, bool, Format, int, bool>;

constexpr size_t kMostPlans = 4096;  // batches of ever new lengths must not fill memory

// After a fork only the forking thread exists, so a wait for torch's thread pool would never end.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// The leading bits of n, then zeros: problems whose numbers agree in them share a plan.
int64_t leading(int64_t n, int bits) {
  int dropped = 0;
  while (n >> dropped >> bits) ++dropped;
  return n >> dropped << dropped;
}

int available_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

std::optional<CpuPlan> cpu_plan(const CellFacts& cell, const Problem& p) {
  thread_local std::map<PlanKey, std::optional<CpuPlan>> plans;
  thread_local int64_t epoch = 0;
  const int threads = available_threads();
  const bool contended = threads > 1 && contention().lasts();
  if (epoch != plans_epoch || plans.size() >= kMostPlans) {
    plans.clear();
    epoch = plans_epoch;
  }
  const int bits = python().significant_bits;
  const PlanKey key{&cell,         leading(p.steps, bits),
                    p.batch,       leading(p.rows, bits),
                    p.inputs,      p.hidden,
                    p.recurrences, p.dtype,
                    p.tape,        p.backward,
                    p.projected,   p.frozen,
                    p.format,      threads,
                    contended};
  auto cached = plans.find(key);
  if (cached != plans.end()) return cached->second;
  py::gil_scoped_acquire gil;
  const py::object answer = python().plan(
      py::arg("cell") = cell.name, py::arg("steps") = p.steps, py::arg("batch") = p.batch,
      py::arg("rows") = p.rows, py::arg("inputs") = p.inputs, py::arg("hidden") = p.hidden,
      py::arg("gates") = cell.gates, py::arg("input_gates") = cell.input_gates,
      py::arg("recurrent_gates") = cell.recurrent_gates, py::arg("all_summed") = cell.all_summed(),
      py::arg("states") = cell.states, py::arg("recurrences") = p.recurrences,
      py::arg("dtype") = c10::toString(p.dtype), py::arg("tape") = p.tape,
      py::arg("backward") = p.backward, py::arg("projected") = p.projected,
      py::arg("frozen") = p.frozen, py::arg("projectable") = cell.projectable,
      py::arg("stages") = cell.stages, py::arg("format") = name_of(p.format),
      py::arg("compiled") = cell.has_code(p.format), py::arg("threads") = threads,
      py::arg("contended") = contended);
  std::optional<CpuPlan> plan;
  if (!answer.is_none()) {
    const auto [weights, recurrences, sequences, units, chunk_rows] =
        answer.cast<std::tuple<int32_t, int32_t, int32_t, int32_t, int64_t>>();
    plan = CpuPlan{static_cast<WeightLayout>(weights), recurrences, sequences, units, chunk_rows};
  }
  return plans.emplace(key, plan).first->second;
}

void forget_plans() { ++plans_epoch; }

int64_t plans_forgotten() { return plans_epoch; }

}  // namespace fastrnn
