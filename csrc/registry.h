// Which cells there are, and their compiled code for this machine.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "scan.h"

namespace fastrnn {

// What the op must know about a cell; `compiled` is null where there is no code for it.
struct CellFacts {
  std::string name;
  int32_t gates = 0;
  int32_t states = 0;
  int32_t kept = 0;
  uint32_t tied = 0;
  const CompiledCell* compiled = nullptr;

  bool tied_gate(int32_t g) const { return tied >> g & 1; }
  bool all_tied() const { return tied == (gates >= 32 ? ~0u : (1u << gates) - 1); }
  // Values a row keeps per unit: states past the first, what the derivative needs, and state 0
  // before its projection.
  int64_t tape_width(bool projected) const { return states - 1 + kept + projected; }
  bool projectable() const { return compiled && compiled->projectable; }
};

// The facts of a cell, or null. The pointer stays valid for good.
const CellFacts* find_cell(const std::string& name);
// Makes a cell known that has no compiled code.
void declare_cell(CellFacts facts);
// Adds the cells of a shared library; throws std::runtime_error when it cannot be loaded.
void load_cells(const std::string& path, const std::string& symbol);

// Instruction sets compiled in, best last, and the one in use: the best this machine has, or the
// one named by the environment variable FASTRNN_ISA.
std::vector<std::string> compiled_isas();
std::string isa_in_use();
// Widest vector of the instruction set in use.
int64_t vector_bytes();

}  // namespace fastrnn
