// Instantiates the CPU kernel for all cells and one instruction set; compiled once for each
// (FASTRNN_ISA names it).
//
// With FASTRNN_FORMATS this has the kernels of the formats with converted rows that the instruction
// set has, and no others: they are an object of their own. Formats with scales are for inference.
//
// A custom cell is compiled at run time, in the one format that FASTRNN_FORMAT names, and in two
// parts (FASTRNN_PART), which two compilers work on at the same time: 1 has the forward pass and
// the table, 2 has the backward pass and the stepper. FASTRNN_ISA is then the instruction set whose
// code the cell shares (exported.h).
#include <type_traits>

#include "core/cell.h"
#include "cpu/backward.h"
#include "cpu/contract.h"
#include "cpu/exported.h"
#include "cpu/formats.h"
#include "cpu/forward.h"
#include "cpu/integers.h"
#include "cpu/prepacked.h"
#include "cpu/staged.h"
#include "cpu/staged_backward.h"
#include "cpu/staged_forward.h"
#include "cpu/staged_stepper.h"
#include "cpu/staged_weights.h"
#include "cpu/step.h"
#ifndef FASTRNN_PART
#include "cpu/gradients.h"
#endif

namespace fastrnn {

namespace {

// The kernels of a cell: one formula for each unit, or stages.
template <class Cell, class F, bool kStaged = kIsStaged<Cell> >
struct Kernels {
  using Pass = Forward<Cell, F>;
  using Gradient = Backward<Cell, F>;
  using Weights = Prepacked<Cell, F>;
  using Stepper = Step<Cell, F>;
};
template <class Cell, class F>
struct Kernels<Cell, F, true> {
  using Pass = StagedForward<Cell, F>;
  using Gradient = StagedBackward<Cell, F>;
  using Weights = StagedWeights<Cell, F>;
  using Stepper = StagedStepper<Cell, F>;
};

}  // namespace

#ifdef FASTRNN_PART
using CustomFormat = FASTRNN_FORMAT;
bool custom_backward(const BackwardArgs&, const CpuPlan&);
void custom_step(const StepArgs&);
#endif

#if defined(FASTRNN_PART) && FASTRNN_PART == 2

#define FASTRNN_REST(Cell)                                              \
  bool custom_backward(const BackwardArgs& args, const CpuPlan& plan) { \
    if constexpr (CustomFormat::kScaled)                                \
      return false;                                                     \
    else                                                                \
      return Kernels<Cell, CustomFormat>::Gradient::run(args, plan);    \
  }                                                                     \
  void custom_step(const StepArgs& args) { Kernels<Cell, CustomFormat>::Stepper::run(args); }
FASTRNN_CELLS(FASTRNN_REST)

}  // namespace fastrnn

#else

namespace {

template <class Cell, class F>
constexpr void add_code(CompiledCell& to) {
  constexpr int format = index_of(F::kFormat);
  using Own = Kernels<Cell, F>;
  to.forward[format] = &Own::Pass::run;
  to.prepacked_bytes[format] = &Own::Weights::bytes;
  to.pack[format] = &Own::Weights::pack_all;
  to.step_room[format] = &Own::Stepper::room;
#ifdef FASTRNN_PART
  to.step[format] = custom_step;
  if constexpr (!F::kScaled) to.backward[format] = custom_backward;
#else
  to.step[format] = &Own::Stepper::run;
  if constexpr (!F::kScaled) to.backward[format] = &Own::Gradient::run;
#endif
}

template <class Cell>
constexpr CompiledCell compiled() {
  static_assert(
      Cell::kGates <= kMaxGates && Cell::kStates <= kMaxStates && Cell::kParams <= kMaxParams,
      "a cell has at most 16 gates, 8 states and 32 parameters");
  CompiledCell cell{};
  cell.name = Cell::kName;
  cell.gates = Cell::kGates;
  cell.input_gates = kInputGates<Cell>;
  cell.recurrent_gates = kRecurrentGates<Cell>;
  cell.states = Cell::kStates;
  cell.saved = Cell::kSaved;
  cell.params = Cell::kParams;
  cell.shared_params = Cell::kSharedParams;
  cell.summed = static_cast<uint32_t>(kSummedGates<Cell>);
  cell.projectable = Cell::kProjectable;
  cell.gate_params = GateParams<Cell>::value;
  cell.draws = Draws<Cell>::count;
  if constexpr (kIsStaged<Cell>) {
    cell.stages = sizeof(Cell::kForward.stage) / sizeof(Cell::kForward.stage[0]);
    cell.rows = Cell::kRows;
    cell.sites = Cell::kSites;
    for (int g = 0; g < kRecurrentGates<Cell>; ++g) cell.site_of[g] = Cell::kSiteOf[g];
  }
#if defined(FASTRNN_PART)
  add_code<Cell, CustomFormat>(cell);
#elif defined(FASTRNN_FORMATS)
#if defined(FASTRNN_VNNI)
  add_code<Cell, Bfloat16>(cell);
#endif
  add_code<Cell, Int8>(cell);
  add_code<Cell, Int16>(cell);
#else
  add_code<Cell, Plain<float> >(cell);
  add_code<Cell, Plain<double> >(cell);
#endif
  return cell;
}

#define FASTRNN_COMPILED(Cell) compiled<Cell>(),
constexpr CompiledCell kCells[] = {FASTRNN_CELLS(FASTRNN_COMPILED)};

}  // namespace
}  // namespace fastrnn

#define FASTRNN_JOIN_(a, b) a##b
#define FASTRNN_JOIN(a, b) FASTRNN_JOIN_(a, b)
#if defined(FASTRNN_PART)
#define FASTRNN_TABLE fastrnn_cells_custom
#elif defined(FASTRNN_FORMATS)
#define FASTRNN_TABLE FASTRNN_JOIN(fastrnn_formats_, FASTRNN_ISA)
#else
#define FASTRNN_TABLE FASTRNN_JOIN(fastrnn_cells_, FASTRNN_ISA)
#endif

extern "C" FASTRNN_EXPORTED fastrnn::CompiledCells FASTRNN_TABLE() {
  fastrnn::CompiledCells all{
      fastrnn::kCells, sizeof(fastrnn::kCells) / sizeof(fastrnn::kCells[0]), {}};
#if defined(FASTRNN_FORMATS) && defined(FASTRNN_VNNI)
  all.gradients[fastrnn::index_of(fastrnn::Format::kBfloat16)] =
      &fastrnn::GradientSweep<fastrnn::Bfloat16>::run;
#elif !defined(FASTRNN_FORMATS) && !defined(FASTRNN_PART)
  all.gradients[fastrnn::index_of(fastrnn::Format::kFloat)] =
      &fastrnn::GradientSweep<fastrnn::Plain<float> >::run;
  all.gradients[fastrnn::index_of(fastrnn::Format::kDouble)] =
      &fastrnn::GradientSweep<fastrnn::Plain<double> >::run;
#endif
  return all;
}

#endif
