// How a group of blocks shares the product of a persistent kernel, and what a block holds. A plan
// decides by the same rules, with the constants in `CudaTables` of csrc/cuda/contract.h.
//
// This header has no device code. csrc/cuda/persistent/product.cuh explains A, B and the depth.
#pragma once

#include "cuda/contract.h"
#include "cuda/platform.cuh"

namespace fastrnn {
namespace tile {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 8;  // of a block: a thread of 8 warps can have 255 registers
constexpr int kThreads = kWarp * kMaxWarps;
constexpr int kKBlock = 64;            // bytes of the depth
constexpr int kPiece = 16;             // bytes of the depth that are sent as one
constexpr int kRowPad = 16;            // bytes: rows of ldmatrix are an odd number of pieces apart
constexpr int kFragment = kWarp * 16;  // bytes of a tile of A, 16 rows by half a k-block
constexpr int kKBlockRegisters = 8;    // of a thread, for a k-block of a tile of A
constexpr int kGradient = 2 * kWarp * sizeof(float2);  // bytes for 16 units in 8 columns
constexpr int kStop = sizeof(int);                     // bytes: the steps of a column
constexpr int kBarriers = 2 * sizeof(uint64_t);        // bytes of the mbarriers of a block

constexpr int operand_bytes(Precision precision) {
  return precision == Precision::kBfloat16 || precision == Precision::kFloat16 ? 2 : 4;
}

// ---- Layout of a launch ------------------------------------------------------------------------

// How a group of blocks shares a product, and a block's shared memory. A *row group* is the rows
// that one warp sums up, `tiles` times 16. If a block has more warps than row groups, several warps
// share a row group and each takes a slice of the depth.
struct Layout {
  int groups;    // row groups of a block
  int active;    // blocks with row groups: ranks 0 to active - 1
  int slices;    // of the depth
  int k_blocks;  // of a row of B
  int depth;     // k-blocks of a slice; the last slices may have fewer or none
  int resident;  // those of a slice that stay in registers; the others lie in shared memory
  // Powers of two: the threads that copy a row of a slice of B from a grid, a piece each, of its
  // `resident` k-blocks and of the others.
  int copying, copying_rest;
  int exchanged;  // bytes of a row of B that blocks compute and exchange, the rest is zero
  int pitch;      // bytes from a row of B to the next
  int tile;       // bytes of B in shared memory, all columns; 0 if it stays in global memory
  // Offsets in shared memory, after B (once or twice): weights, partial sums, `staged` bytes for
  // each warp to collect the pieces that it sends, memory of row groups, and mbarriers.
  int weights, partial, staging, staged, own, barriers;
  int64_t bytes;  // of shared memory

  constexpr int warps() const { return groups * slices; }
};

// The needs of a kernel, from which its layout follows.
struct Need {
  int64_t row_groups;  // of all blocks together
  int64_t exchanged;   // bytes of a row of B
  int tiles;           // of 16 rows, of a row group
  int columns;         // of B: rows of the batch
  int resident;        // k-blocks of a slice for which there are registers
  int staged;          // bytes that a warp collects at a time
  int own = 0;  // bytes that a row group keeps; if any, its warps share the sums: `share_sums`
  bool in_place = false;  // in a grid, warps read their slices of B in global memory
};

// The power of two that is enough for the pieces of these k-blocks.
constexpr int power_for(int k_blocks) {
  int power = 0;
  while ((1 << power) * kPiece < k_blocks * kKBlock) ++power;
  return power;
}

// The layout for `plan.blocks` blocks of at most `plan.warps` warps. `groups` is 0 if a block would
// have more than kMaxWarps row groups. Whether the device has `bytes` is not checked.
constexpr Layout lay_out(const Need& need, const CudaPlan& plan) {
  Layout at{};
  const int64_t groups = (need.row_groups + plan.blocks - 1) / plan.blocks;
  if (groups > kMaxWarps) return at;
  at.groups = static_cast<int>(groups);
  at.active = static_cast<int>((need.row_groups + groups - 1) / groups);
  const int warps = plan.warps < kMaxWarps ? plan.warps : kMaxWarps;
  at.slices = warps > at.groups ? warps / at.groups : 1;
  at.k_blocks = static_cast<int>((need.exchanged + kKBlock - 1) / kKBlock);
  if (at.slices > at.k_blocks) at.slices = at.k_blocks;
  at.depth = (at.k_blocks + at.slices - 1) / at.slices;
  at.slices = (at.k_blocks + at.depth - 1) / at.depth;
  at.resident = at.depth < need.resident ? at.depth : need.resident;
  at.copying = power_for(at.resident);
  at.copying_rest = power_for(at.depth - at.resident);
  at.exchanged = static_cast<int>(need.exchanged);
  at.pitch = at.k_blocks * kKBlock + kRowPad;
  const bool in_place = need.in_place && plan.residency == kGrid;
  const int64_t tile = in_place ? 0 : int64_t{at.pitch} * need.columns;
  at.tile = static_cast<int>(tile);
  int64_t end = tile * (plan.residency == kGrid ? 1 : 2);
  if (end > (int64_t{1} << 30)) end = int64_t{1} << 30;  // no device has as much
  at.weights = static_cast<int>(end);
  end += int64_t{2} * kFragment * need.tiles * (at.depth - at.resident) * at.warps();
  at.partial = static_cast<int>(end);
  const int written = need.own > 0 ? at.slices : at.slices - 1;
  end += int64_t{kFragment} * need.tiles * (need.columns / 8) * written * at.groups;
  at.staging = static_cast<int>(end);
  at.staged = need.staged;
  end += int64_t{need.staged} * (need.own > 0 ? at.warps() : at.groups);
  at.own = static_cast<int>(end);
  end += int64_t{need.own} * at.groups;
  at.barriers = static_cast<int>(end);
  at.bytes = end + kBarriers;
  return at;
}

// ---- Registers and row groups of a direction ---------------------------------------------------

// The units of row groups that kernels are compiled for, given a cell's number of gates and the
// number of column tiles, of 8 columns each; 0 stands for none.
struct RowGroups {
  int units[3];
};

// Registers of a thread that hold weights: 255 less the sums, the operand in flight, and states and
// inputs of the cell, which grow with the number of columns and of tiles. The criterion is that no
// kernel spills; tests compile them all. 0 if there is no kernel.
struct Forward {
  static constexpr int registers(bool split, int tiles, int column_tiles) {
    constexpr int kWhole[3][4] = {{128, 128, 96, 96}, {96, 96, 72, 64}, {48, 48, 24, 32}};
    constexpr int kSplit[3][4] = {{96, 96, 72, 32}, {64, 64, 48, 32}, {}};
    return (split ? kSplit : kWhole)[column_tiles / 2][tiles < 4 ? tiles - 1 : 3];
  }

  // A row group has the rows of all gates of its units: the fewest units that make whole tiles, or
  // the most that make up to four.
  static constexpr RowGroups row_groups(int gates, int column_tiles) {
    const int few = gates % 2 == 0 ? 8 : 16;
    const int many = 64 / gates / few * few;
    return {{few, many > few && column_tiles <= 2 ? many : 0, 0}};
  }
};

struct Backward {
  // Whole k-blocks of one tile; the parts of split numbers take some.
  static constexpr int registers(bool split, int tiles, int column_tiles) {
    const int parts = !split ? 0 : tiles * column_tiles >= 8 ? 6 : 4;
    const int whole = column_tiles < 4 ? 10 : tiles == 1 ? 6 : 7;
    return kKBlockRegisters * (whole - parts);
  }

  // A row group has one row for each of its units.
  static constexpr RowGroups row_groups(int gates, int column_tiles) {
    return {{16, 32, gates == 1 && column_tiles == 1 ? 64 : 0}};
  }
};

// K-blocks of a slice that stay in the registers of a kernel.
template <class Direction, Precision precision, int kTiles, int kColumnTiles>
constexpr int resident_k_blocks() {
  constexpr int kRegisters =
      Direction::registers(precision == Precision::kTf32x3, kTiles, kColumnTiles);
  constexpr int kKBlocks = kRegisters / (kKBlockRegisters * kTiles);
  return kKBlocks > 0 ? kKBlocks : 1;
}

}  // namespace tile
}  // namespace fastrnn
