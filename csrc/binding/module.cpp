// The Python module `fastrnn._C`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "binding/callbacks.h"
#include "binding/cpu_kernel.h"
#include "binding/cuda_launches.h"
#include "binding/fingerprint.h"
#include "binding/op.h"
#include "binding/plan_cache.h"
#include "cpu/contention.h"
#include "cpu/spin.h"

namespace py = pybind11;

namespace fastrnn {

void bind_plain_calls(py::module_& m);  // plain.cpp
void bind_stepper(py::module_& m);      // stepper.cpp
void bind_slots(py::module_& m);        // slots.cpp

namespace {

// torch.ops.fastrnn.scan, with arguments converted in a third of the time.
std::pair<Tensor, std::vector<Tensor>> scan_from_python(
    const std::string& cell, const Tensor& x, const std::vector<Tensor>& w_ih,
    const std::vector<Tensor>& w_hh, const std::vector<Tensor>& b_ih,
    const std::vector<Tensor>& b_hh, const std::vector<Tensor>& w_hr,
    const std::vector<Tensor>& params, const std::vector<Tensor>& s0,
    const std::vector<Tensor>& reset_states, const std::optional<Tensor>& batch_sizes,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
    const std::optional<Tensor>& noise, int64_t reverse, bool recompute) {
  auto [y, states, tape] = call_scan({cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, params, s0,
                                      reset_states, batch_sizes, lengths, resets, noise, reverse},
                                     false, recompute);
  return {y, states};
}

std::pair<Tensor, std::vector<Tensor>> packed_from_python(
    const std::string& cell, const Tensor& x, const std::vector<Tensor>& w_ih,
    const std::vector<Tensor>& w_hh, const std::vector<Tensor>& b_ih,
    const std::vector<Tensor>& b_hh, const std::vector<Tensor>& w_hr,
    const std::vector<Tensor>& params, const std::vector<Tensor>& s0,
    const std::vector<Tensor>& reset_states, const std::optional<Tensor>& batch_sizes,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
    const std::optional<Tensor>& noise, int64_t reverse, const std::vector<Tensor>& packed,
    const Tensor& expected, const std::string& format) {
  std::vector<Tensor> list =
      call_packed({cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states, batch_sizes,
                   lengths, resets, noise, reverse, packed, format_named(format)},
                  expected);
  Tensor y = std::move(list.front());
  list.erase(list.begin());
  return {std::move(y), std::move(list)};
}

Tensor pack_from_python(const std::string& cell, const std::string& format,
                        const std::vector<std::optional<Tensor>>& weights,
                        const std::vector<Tensor>& scales) {
  return pack(known_cell(cell, at::kCPU, format_named(format)), format_named(format), weights,
              scales);
}

// `launch` has what CudaLaunch has, `plan` the fields of CudaPlan.
bool keep_launch_from_python(const std::string& cell, const Tensor& x,
                             const std::vector<Tensor>& w_ih, const std::vector<Tensor>& w_hh,
                             const std::vector<Tensor>& b_ih, const std::vector<Tensor>& b_hh,
                             const std::vector<Tensor>& w_hr, const std::vector<Tensor>& params,
                             const std::vector<Tensor>& s0, const std::vector<Tensor>& reset_states,
                             const std::optional<Tensor>& batch_sizes,
                             const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& resets,
                             const std::optional<Tensor>& noise, int64_t reverse, bool backward,
                             uintptr_t run, uintptr_t error, uintptr_t capturing,
                             const std::array<int32_t, 7>& plan, int64_t workspace,
                             std::pair<int64_t, int64_t> steps, int64_t epoch) {
  CudaLaunch launch;
  launch.run = reinterpret_cast<decltype(launch.run)>(run);
  launch.error = reinterpret_cast<decltype(launch.error)>(error);
  launch.capturing = reinterpret_cast<decltype(launch.capturing)>(capturing);
  launch.plan = {
      static_cast<Precision>(plan[0]), plan[1], plan[2], plan[3], plan[4], plan[5], plan[6]};
  launch.workspace = workspace;
  launch.least_steps = steps.first;
  launch.most_steps = steps.second;
  launch.epoch = epoch;
  return keep_launch({cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, params, s0, reset_states, batch_sizes,
                      lengths, resets, noise, reverse},
                     backward, launch);
}

std::vector<std::string> formats() {
  std::vector<std::string> names;
  for (int format = 0; format < kFormats; ++format)
    if (has_format(static_cast<Format>(format)))
      names.push_back(name_of(static_cast<Format>(format)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_plain_calls(m);
  bind_stepper(m);
  bind_slots(m);
  m.def("scan", scan_from_python, py::call_guard<py::gil_scoped_release>(),
        "torch.ops.fastrnn.scan without its tape.");
  m.def("transposed", transposed, py::call_guard<py::gil_scoped_release>(),
        "`y.transpose(0, 1)` that autograd does not take for a view.");
  m.def("scan_packed", packed_from_python, py::call_guard<py::gil_scoped_release>());
  m.def("pack", pack_from_python, py::call_guard<py::gil_scoped_release>(), py::arg("cell"),
        py::arg("format"), py::arg("weights"), py::arg("scales"));
  m.def(
      "keep_launch", keep_launch_from_python, py::arg("cell"), py::arg("x"), py::arg("w_ih"),
      py::arg("w_hh"), py::arg("b_ih"), py::arg("b_hh"), py::arg("w_hr"), py::arg("params"),
      py::arg("s0"), py::arg("reset_states"), py::arg("batch_sizes"), py::arg("lengths"),
      py::arg("resets"), py::arg("noise"), py::arg("reverse"), py::kw_only(), py::arg("backward"),
      py::arg("run"), py::arg("error"), py::arg("capturing"), py::arg("plan"), py::arg("workspace"),
      py::arg("steps"), py::arg("epoch"),
      "Launches later calls of the shape of this one in the same way, without Python. `steps` are "
      "the least and the most of such calls.");
  m.def(
      "fingerprint", [](const std::vector<Tensor>& tensors) { return fingerprint(tensors); },
      "The fingerprint of weights, which scan_packed takes as `expected`.");
  m.attr("built_for") = FASTRNN_TORCH_VERSION;
  m.def("isas", compiled_isas, "The compiled instruction sets that this machine has, best last.");
  m.def("isa", isa_in_use);
  m.def("formats", formats, "The formats that the instruction set in use has kernels for.");
  m.def(
      "format_of", [](const Tensor& x) { return name_of(format_of(x.scalar_type())); },
      "The format in which tensors of the dtype of `x` are multiplied.");
  m.def("vector_bytes", vector_bytes);
  m.def("forget_plans", forget_plans);
  m.def("plans_forgotten", plans_forgotten, "How often plans were forgotten.");
  m.def(
      "contended", [] { return contention().lasts(); },
      "Whether a thread came late a short time ago, because other work has its core.");
  m.def(
      "late_peer", [] { contention().late(nanoseconds()); },
      "Behaves as if a thread came late now; for tests.");
  m.def("end_contention", [] { contention().end(); }, "Forgets all late threads; for tests.");
  m.def(
      "add_cell_facts",
      [](const std::string& name, int32_t gates, int32_t states, int32_t saved, int32_t params,
         uint32_t summed, uint32_t shared_params, bool projectable, uint32_t gate_params,
         int32_t stages, int32_t rows, int32_t draws, int32_t input_gates,
         int32_t recurrent_gates) {
        CellTraits traits{gates,         states,      saved,       params, summed,
                          shared_params, projectable, gate_params, stages, rows};
        traits.draws = draws;
        traits.input_gates = input_gates < 0 ? gates : input_gates;
        traits.recurrent_gates = recurrent_gates < 0 ? gates : recurrent_gates;
        add_cell_facts(name, traits);
      },
      py::arg("name"), py::kw_only(), py::arg("gates"), py::arg("states"), py::arg("saved"),
      py::arg("params"), py::arg("summed"), py::arg("shared_params"), py::arg("projectable"),
      py::arg("gate_params") = 0, py::arg("stages") = 1, py::arg("rows") = 0, py::arg("draws") = 0,
      py::arg("input_gates") = -1, py::arg("recurrent_gates") = -1,
      "Adds a cell without code for CPUs, which load_cells may add later.");
  m.def(
      "has_code",
      [](const std::string& name, const std::string& format) {
        const CellFacts* cell = find_cell(name);
        return cell && cell->has_code(format_named(format));
      },
      py::arg("name"), py::arg("format") = "float32",
      "Whether a cell is known and has code for CPUs in a format.");
  m.def(
      "load_cells",
      [](const std::string& path, const std::string& symbol) {
        load_cells(path, symbol);
        forget_plans();  // drops those made before these cells had code
      },
      py::arg("path"), py::arg("symbol"));
  m.def(
      "cell_facts",
      [](const std::string& name, bool projected) -> py::object {
        const CellFacts* cell = find_cell(name);
        if (!cell) return py::none();
        return py::make_tuple(cell->input_gates, cell->states, cell->tape_width(projected, 1, 0),
                              cell->rows);
      },
      py::arg("name"), py::arg("projected") = false,
      "(gates with rows in w_ih, states, width of the tape without results of reductions, number "
      "of those) of a "
      "cell, or None.");
  m.def(
      "autocast_dtype",
      [](const std::string& cell, const Tensor& x, const std::vector<Tensor>& s0) {
        return autocast_dtype(cell, x, s0);
      },
      py::arg("cell"), py::arg("x"), py::arg("s0"),
      "The dtype that autocast gives the operands of a scan.");
  m.attr("most_recurrences") = kMostRecurrences;
  m.def(
      "set_callbacks",
      [](py::object plan, py::object find, py::object forward, py::object backward,
         py::object reference_backward, py::object tables, int significant_bits) {
        set_callbacks(new Callbacks{plan, find, forward, backward, reference_backward, tables,
                                    significant_bits});
      },
      py::kw_only(), py::arg("plan"), py::arg("find"), py::arg("forward"), py::arg("backward"),
      py::arg("reference_backward"), py::arg("tables"), py::arg("significant_bits"));
}

}  // namespace fastrnn
