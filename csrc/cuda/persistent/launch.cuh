// How a plan becomes a launch, for the persistent kernels of both directions. The residency is a
// parameter of their templates, because a step is too short for its branches. Each has a source of
// its own, because one takes minutes to compile.
//
// Each direction has a struct `Direction` with
//   Traits<Cell, precision, units, kColumnTiles>: the traits X of the kernel for row groups of that
//     many units and tiles of 8 * kColumnTiles columns; X::need(hidden) gives its needs
//   kernel<X, residency>(): the kernel
//   registers, row_groups: as in `tile::Forward` and `tile::Backward`
#pragma once

#include <limits>

#include "core/cell.h"
#include "cuda/launch.h"
#include "cuda/persistent/exchange.cuh"

namespace fastrnn {
namespace persistent {

// The argument of the kernels besides the sweep. Both kernels derive a thread's position from it in
// local variables, because their lambdas could not capture structured bindings.
struct Launched {
  tile::Layout at;
  int first;    // first group of this launch
  int tiles;    // of the batch
  int blocks;   // of a group, those without units included
  char* flags;  // of a grid
  char* areas;
};

// The exchange of the group of blocks `task`, for a warp of its block of this rank.
template <class X, int kResidency>
__device__ __forceinline__ auto exchange_of(const Launched& launched, int task, int rank,
                                            int operands, char* shared) {
  const tile::Layout& at = launched.at;
  const int slice = threadIdx.x / tile::kWarp / at.groups;
  const int owned = at.groups * X::kPieces * tile::kPiece;  // unless it is read in place
  return tile::Exchange<kResidency, X::kReadsInPlace && kResidency == kGrid>{
      at,
      rank,
      slice,
      X::kColumns,
      operands,
      shared,
      reinterpret_cast<uint64_t*>(shared + at.barriers),
      slice * at.depth * tile::kKBlock / owned,
      owned,
      task,
      launched.areas,
      launched.flags};
}

// The largest value of kLanes adjacent lanes, in each of them.
template <int kLanes>
__device__ __forceinline__ int most_of_lanes(int most) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, most, lanes);
    most = other > most ? other : most;
  }
  return most;
}

template <class X>
tile::Layout lay_out(const Sweep& sweep, const CudaPlan& plan) {
  return tile::lay_out(X::need(sweep.hidden), plan);
}

// The number of groups of blocks: one for each recurrence and tile of the batch.
inline int64_t batch_tiles(const Sweep& sweep, const CudaPlan& plan) {
  return (sweep.batch + plan.batch_tile - 1) / plan.batch_tile;
}
inline int64_t groups(const Sweep& sweep, const CudaPlan& plan) {
  return sweep.recurrences * batch_tiles(sweep, plan);
}

// Calls f(X{}) with the traits for a row group of `units`.
template <class Direction, class Cell, Precision precision, int kColumnTiles, int kIndex = 0,
          class F>
int with_units(int units, F f) {
  constexpr tile::RowGroups kThere = Direction::row_groups(Cell::kGates, kColumnTiles);
  if constexpr (kIndex < 3) {
    constexpr int kUnits = kThere.units[kIndex];
    if constexpr (kUnits > 0) {
      using X = typename Direction::template Traits<Cell, precision, kUnits, kColumnTiles>;
      if (units == kUnits) return f(X{});
    }
    return with_units<Direction, Cell, precision, kColumnTiles, kIndex + 1>(units, f);
  } else {
    return kInvalidConfiguration;
  }
}

template <class Direction, class Cell, Precision precision, int kColumnTiles, class F>
int with_row_group(const CudaPlan& plan, F f) {
  if constexpr (Direction::registers(precision == Precision::kTf32x3, 1, kColumnTiles) == 0) {
    return kInvalidConfiguration;
  } else {
    return with_units<Direction, Cell, precision, kColumnTiles>(plan.row_group, f);
  }
}

template <class Direction, class Cell, Precision precision, class F>
int with_columns(const CudaPlan& plan, F f) {
  if constexpr (is_compiled(precision)) {
    switch (plan.batch_tile) {
      case 8:
        return with_row_group<Direction, Cell, precision, 1>(plan, f);
      case 16:
        return with_row_group<Direction, Cell, precision, 2>(plan, f);
      case 32:
        return with_row_group<Direction, Cell, precision, 4>(plan, f);
    }
  }
  return kInvalidConfiguration;
}

// Calls f(X{}) with the traits of the kernel for a cell and a plan.
template <class Direction, class F>
int with_traits(int cell, const CudaPlan& plan, F f) {
  const bool one = plan.residency == kBlock && plan.blocks == 1;
  if (!one && (plan.residency == kBlock || plan.blocks < 1)) return kInvalidConfiguration;
  if (plan.warps < 1) return kInvalidConfiguration;
  return with_cell(cell, [&](auto c) {
    using Cell = decltype(c);
    switch (plan.precision) {
      case Precision::kTf32:
        return with_columns<Direction, Cell, Precision::kTf32>(plan, f);
      case Precision::kTf32x3:
        return with_columns<Direction, Cell, Precision::kTf32x3>(plan, f);
      case Precision::kBfloat16:
        return with_columns<Direction, Cell, Precision::kBfloat16>(plan, f);
      case Precision::kFloat16:
        return with_columns<Direction, Cell, Precision::kFloat16>(plan, f);
      default:
        return kInvalidConfiguration;
    }
  });
}

template <class X, int kResidency>
int launch_kernel(void (*kernel)(Sweep, Launched), const Sweep& sweep, const CudaPlan& plan,
                  void* stream) {
  const tile::Layout at = lay_out<X>(sweep, plan);
  const int64_t all = groups(sweep, plan);
  const bool too_many = all * plan.blocks > std::numeric_limits<int32_t>::max();
  if (at.groups == 0 || too_many || plan.groups < 1) return kInvalidConfiguration;
  char* flags = static_cast<char*>(sweep.workspace);
  const int64_t flag_bytes = all * tile::flag_bytes(at);
  if (kResidency == kGrid) {
    const int error = platform::clear(flags, flag_bytes, stream);
    if (error != 0) return error;
  }
  const int tiles = static_cast<int>(batch_tiles(sweep, plan));
  Launched launched{at, 0, tiles, plan.blocks, flags, flags + flag_bytes};
  platform::Launch how;
  how.block = dim3(tile::kWarp * at.warps());
  how.shared_bytes = at.bytes;
  how.cluster = kResidency == kCluster ? plan.blocks : 1;
  how.cooperative = kResidency == kGrid;
  const int64_t at_once = kResidency == kGrid ? plan.groups : all;
  for (int64_t first = 0; first < all; first += at_once) {
    launched.first = static_cast<int>(first);
    const int64_t now = all - first < at_once ? all - first : at_once;
    how.grid = dim3(static_cast<unsigned>(now * plan.blocks));
    const int error = platform::launch(kernel, how, stream, sweep, launched);
    if (error != 0) return error;
  }
  return 0;
}

// ---- Entry -------------------------------------------------------------------------------------

template <class Direction, int kResidency>
int launch(int cell, const Sweep& sweep, const CudaPlan& plan, void* stream) {
  return with_traits<Direction>(cell, plan, [&](auto x) {
    using X = decltype(x);
    return launch_kernel<X, kResidency>(Direction::template kernel<X, kResidency>(), sweep, plan,
                                        stream);
  });
}

template <class Direction, int kResidency>
int64_t workspace_bytes(int cell, const Sweep& sweep, const CudaPlan& plan) {
  int64_t bytes = 0;
  if (kResidency != kGrid) return bytes;
  with_traits<Direction>(cell, plan, [&](auto x) {
    using X = decltype(x);
    const tile::Layout at = lay_out<X>(sweep, plan);
    bytes = groups(sweep, plan) * (tile::flag_bytes(at) + tile::area_bytes(at, X::kColumns));
    return 0;
  });
  return bytes;
}

// Negative if the plan fits no block.
template <class Direction>
int64_t shared_bytes(int cell, const Sweep& sweep, const CudaPlan& plan) {
  int64_t bytes = -1;
  with_traits<Direction>(cell, plan, [&](auto x) {
    const tile::Layout at = lay_out<decltype(x)>(sweep, plan);
    if (at.groups > 0) bytes = at.bytes;
    return 0;
  });
  return bytes;
}

// What a source of the kernels of a direction and a residency defines.
template <class Direction, int kResidency>
constexpr PersistentKernels entry() {
  return {launch<Direction, kResidency>, workspace_bytes<Direction, kResidency>,
          shared_bytes<Direction>};
}

}  // namespace persistent
}  // namespace fastrnn
