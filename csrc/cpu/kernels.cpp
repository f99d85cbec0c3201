// Instantiates the CPU kernel for all cells and one instruction set; compiled once for each
// (FASTRNN_ISA names it).
//
// A custom cell is compiled at run time, in the one type that FASTRNN_TYPE names, and in two parts
// (FASTRNN_PART), which two compilers work on at the same time: 1 has the forward pass and the
// table, 2 has the backward pass and the stepper.
#include <type_traits>

#include "core/cell.h"
#include "cpu/backward.h"
#include "cpu/contract.h"
#include "cpu/forward.h"
#include "cpu/prepacked.h"
#include "cpu/step.h"
#ifndef FASTRNN_PART
#include "cpu/gradients.h"
#endif

namespace fastrnn {

#ifdef FASTRNN_PART
bool custom_backward(const BackwardArgs&, const CpuPlan&);
void custom_step(const StepArgs&);
#endif

#if defined(FASTRNN_PART) && FASTRNN_PART == 2

#define FASTRNN_REST(Cell)                                              \
  bool custom_backward(const BackwardArgs& args, const CpuPlan& plan) { \
    return Backward<Cell, FASTRNN_TYPE>::run(args, plan);               \
  }                                                                     \
  void custom_step(const StepArgs& args) { Step<Cell, FASTRNN_TYPE>::run(args); }
FASTRNN_CELLS(FASTRNN_REST)

}  // namespace fastrnn

#else

namespace {

template <class Cell, class T>
constexpr void add_code(CompiledCell& to) {
  constexpr int type = std::is_same_v<T, double>;
  to.forward[type] = &Forward<Cell, T>::run;
  to.prepacked_bytes[type] = &Prepacked<Cell, T>::bytes;
  to.pack[type] = &Prepacked<Cell, T>::pack_all;
#ifdef FASTRNN_PART
  to.backward[type] = custom_backward;
  to.step[type] = custom_step;
#else
  to.backward[type] = &Backward<Cell, T>::run;
  to.step[type] = &Step<Cell, T>::run;
#endif
}

template <class Cell>
constexpr CompiledCell compiled() {
  static_assert(Cell::kGates <= kMaxGates && Cell::kStates <= kMaxStates,
                "a cell has at most 16 gates and 8 states");
  CompiledCell cell{};
  cell.name = Cell::kName;
  cell.gates = Cell::kGates;
  cell.states = Cell::kStates;
  cell.saved = Cell::kSaved;
  cell.summed = static_cast<uint32_t>(kSummedGates<Cell>);
  cell.projectable = Cell::kProjectable;
#ifdef FASTRNN_PART
  add_code<Cell, FASTRNN_TYPE>(cell);
#else
  add_code<Cell, float>(cell);
  add_code<Cell, double>(cell);
#endif
  return cell;
}

#define FASTRNN_COMPILED(Cell) compiled<Cell>(),
constexpr CompiledCell kCells[] = {FASTRNN_CELLS(FASTRNN_COMPILED)};

}  // namespace
}  // namespace fastrnn

#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)

extern "C"
    __attribute__((visibility("default"))) fastrnn::CompiledCells FASTRNN_JOIN(fastrnn_cells_,
                                                                               FASTRNN_ISA)() {
  fastrnn::CompiledCells all{
      fastrnn::kCells, sizeof(fastrnn::kCells) / sizeof(fastrnn::kCells[0]), {}};
#ifndef FASTRNN_PART
  all.gradients[0] = &fastrnn::GradientSweep<float>::run;
  all.gradients[1] = &fastrnn::GradientSweep<double>::run;
#endif
  return all;
}

#endif
