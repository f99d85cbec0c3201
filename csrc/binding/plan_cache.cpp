#include "binding/plan_cache.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>

#include "binding/callbacks.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

std::atomic<int64_t> plans_epoch{0};

using PlanKey = std::tuple<const CellFacts*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                           at::ScalarType, at::DeviceType, bool, bool, bool, bool, int>;

constexpr size_t kMostPlans = 4096;  // batches of ever new lengths must not fill the memory

// After a fork only the forking thread exists, and a thread pool that is waited for would never
// answer.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Lengths to one part in eight: a plan hardly depends on them, and asking for one takes longer than
// a small batch does.
int64_t about(int64_t n) {
  int64_t step = 1;
  while (n / step >= 16) step *= 2;
  return n / step * step;
}

int available_threads() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

const Choice& choose(const CellFacts& cell, const Problem& exact) {
  Problem p = exact;
  p.steps = about(p.steps);
  p.rows = about(p.rows);
  thread_local std::map<PlanKey, Choice> known;
  thread_local int64_t epoch = 0;
  const int threads = available_threads();
  if (epoch != plans_epoch || known.size() >= kMostPlans) {
    known.clear();
    epoch = plans_epoch;
  }
  const PlanKey key{&cell,   p.steps,  p.batch, p.rows,     p.inputs,    p.hidden, p.lanes,
                    p.dtype, p.device, p.tape,  p.backward, p.projected, p.frozen, threads};
  auto found = known.find(key);
  if (found != known.end()) return found->second;
  py::gil_scoped_acquire gil;
  auto answer = python().plan(
      py::arg("cell") = cell.name, py::arg("steps") = p.steps, py::arg("batch") = p.batch,
      py::arg("rows") = p.rows, py::arg("inputs") = p.inputs, py::arg("hidden") = p.hidden,
      py::arg("gates") = cell.gates, py::arg("states") = cell.states, py::arg("lanes") = p.lanes,
      py::arg("dtype") = c10::toString(p.dtype),
      py::arg("device") = c10::DeviceTypeName(p.device, /*lower_case=*/true),
      py::arg("tape") = p.tape, py::arg("backward") = p.backward,
      py::arg("projected") = p.projected, py::arg("frozen") = p.frozen,
      py::arg("projectable") = cell.projectable,
      py::arg("compiled") = cell.compiled[p.dtype == at::kDouble] != nullptr,
      py::arg("threads") = threads);
  auto [kernel, packed, lanes, slots, units, chunk_rows] =
      answer.cast<std::tuple<std::string, bool, int32_t, int32_t, int32_t, int64_t>>();
  return known.emplace(key, Choice{kernel, {packed, lanes, slots, units, chunk_rows}})
      .first->second;
}

void forget_plans() { ++plans_epoch; }

}  // namespace fastrnn
