// The known cells, and their compiled code for this machine.
#pragma once

#include <atomic>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/contract.h"
#include "cpu/exported.h"

namespace fastrnn {

// The facts of a cell that the operator needs. Code for CPUs may be added later, or never.
struct CellFacts : CellTraits {
  std::string name;
  std::atomic<const CompiledCell*> compiled[kFormats] = {};

  bool is_shared(int64_t param) const { return shared_params >> param & 1; }
  // Whether u and v count as their sum alone, so that their gradients are one array.
  bool all_summed() const { return summed == (gates >= 32 ? ~0u : (1u << gates) - 1); }
  // Values on the tape for each row and unit: states past the first, saved values, and state 0
  // before its projection; then results of reductions, in the compute type, which takes `ratio`
  // numbers of the tape.
  int64_t tape_width(bool projected, int64_t hidden, int64_t ratio) const {
    return tape_values(states - 1 + saved + projected, rows, ratio, 1, hidden);
  }
  bool has_code(Format format) const { return compiled[index_of(format)] != nullptr; }
  // Its code for CPUs; throws std::runtime_error if there is none in that format.
  FASTRNN_EXPORTED const CompiledCell& code(Format format) const;
};

// The facts of a cell, or null. The pointer stays valid until the process ends.
FASTRNN_EXPORTED const CellFacts* find_cell(const std::string& name);
// Adds a cell by its facts alone, unless it is known.
FASTRNN_EXPORTED void add_cell_facts(const std::string& name, const CellTraits& traits);
// Adds the cells of a shared library; throws std::runtime_error when it cannot be loaded.
FASTRNN_EXPORTED void load_cells(const std::string& path, const std::string& symbol);

// The cell-independent part of the backward pass, in a format without scales.
FASTRNN_EXPORTED bool run_gradients(Format format, const GradientArgs& args, const CpuPlan& plan);

// Instruction sets that are compiled in and that this machine has, best last; and the one in use:
// the best of them, or the one that the environment variable FASTRNN_ISA names.
FASTRNN_EXPORTED std::vector<std::string> compiled_isas();
FASTRNN_EXPORTED std::string isa_in_use();
// Whether that instruction set has kernels for a format.
FASTRNN_EXPORTED bool has_format(Format format);
// The name of a format, and the format of a name; throws std::runtime_error for an unknown name.
FASTRNN_EXPORTED const char* name_of(Format format);
FASTRNN_EXPORTED Format format_named(std::string_view name);
// Widest vector of the instruction set in use.
FASTRNN_EXPORTED int64_t vector_bytes();

}  // namespace fastrnn
