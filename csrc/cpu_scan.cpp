// All cells on a CPU, forward and backward, for one instruction set. Compiled once for each
// (FASTRNN_ISA names it), and at run time for a user's cell.
#include "cell.h"
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_gradients.h"
#include "cpu_packed.h"
#include "cpu_step.h"
#include "scan.h"

#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)

namespace fastrnn {
namespace {

template <class Cell>
constexpr uint32_t tied_bits() {
  uint32_t bits = 0;
  for (int g = 0; g < Cell::kGates; ++g) bits |= uint32_t(Cell::kTied[g]) << g;
  return bits;
}

template <class Cell>
constexpr CompiledCell compiled() {
  static_assert(Cell::kGates <= kMaxGates && Cell::kStates <= kMaxStates,
                "a cell has at most 16 gates and 8 states");
  return {Cell::kName,
          Cell::kGates,
          Cell::kStates,
          Cell::kKept,
          tied_bits<Cell>(),
          Cell::kProjectable,
          {&Forward<Cell, float>::run, &Forward<Cell, double>::run},
          {&Backward<Cell, float>::run, &Backward<Cell, double>::run},
          {&Packed<Cell, float>::bytes, &Packed<Cell, double>::bytes},
          {&Packed<Cell, float>::pack_all, &Packed<Cell, double>::pack_all},
          {&Step<Cell, float>::run, &Step<Cell, double>::run}};
}

#define FASTRNN_COMPILED(Cell) compiled<Cell>(),
constexpr CompiledCell kCells[] = {FASTRNN_CELLS(FASTRNN_COMPILED)};

}  // namespace
}  // namespace fastrnn

extern "C" __attribute__((visibility("default"))) fastrnn::CompiledCells FASTRNN_JOIN(
    fastrnn_cells_, FASTRNN_ISA)() {
  return {fastrnn::kCells,
          sizeof(fastrnn::kCells) / sizeof(fastrnn::kCells[0]),
          {&fastrnn::GradientSweep<float>::run, &fastrnn::GradientSweep<double>::run}};
}
