// The constants of the kernels that a plan needs, as plain data: `CudaTables` of
// csrc/cuda/contract.h. Every number comes from a header that the kernels are compiled with.

#include <vector>

#include "core/cell.h"
#include "cuda/launch.h"
#include "cuda/persistent/exchange.cuh"
#include "cuda/step/tiles.cuh"

namespace fastrnn {
namespace {

constexpr int kBatchTiles[] = {8, 16, 32};

// Whether any cell has this number of gates.
bool has_cell_of(int gates) {
  bool found = false;
#define FASTRNN_HAS(Cell) found = found || Cell::kGates == gates;
  FASTRNN_CELLS(FASTRNN_HAS)
#undef FASTRNN_HAS
  return found;
}

std::vector<CudaRowGroup> row_groups() {
  std::vector<CudaRowGroup> all;
  for (int backward = 0; backward < 2; ++backward) {
    for (int gates = 1; gates <= 64; ++gates) {
      if (!has_cell_of(gates)) continue;
      for (const int columns : kBatchTiles) {
        const tile::RowGroups groups = backward ? tile::Backward::row_groups(gates, columns / 8)
                                                : tile::Forward::row_groups(gates, columns / 8);
        for (const int units : groups.units) {
          if (units > 0) all.push_back({backward, gates, columns, units});
        }
      }
    }
  }
  return all;
}

// The bytes of all gaps in kPieces pieces of 8 columns.
template <int kPieces>
constexpr int staged_gap() {
  return tile::staged_bytes<kPieces>() - 8 * kPieces * tile::kPiece;
}

template <class Tiles>
void fill_step(CudaTables& to, int backward) {
  const auto fill = [&](int i, auto shape) {
    to.step_tiles[i] = decltype(shape)::kRows;
    to.step_units[backward][i] = decltype(shape)::kUnits;
  };
  fill(0, typename Tiles::Small{});
  fill(1, typename Tiles::Middle{});
  fill(2, typename Tiles::Large{});
}

CudaTables fill() {
  CudaTables to{};
  to.recurrences = kMostRecurrences;
  to.warps = tile::kMaxWarps;
  to.k_block_bytes = tile::kKBlock;
  to.piece_bytes = tile::kPiece;
  to.row_pad_bytes = tile::kRowPad;
  to.fragment_bytes = tile::kFragment;
  to.gradient_bytes = tile::kGradient;
  to.stop_bytes = tile::kStop;
  to.barrier_bytes = tile::kBarriers;
  to.k_block_registers = tile::kKBlockRegisters;
  const int gaps[] = {staged_gap<4>(), staged_gap<1>(), staged_gap<2>(), staged_gap<3>()};
  for (int i = 0; i < 4; ++i) to.staged_gap_bytes[i] = gaps[i];
  for (int i = 0; i < 3; ++i) {
    to.batch_tiles[i] = kBatchTiles[i];
    for (int split = 0; split < 2; ++split) {
      for (int tiles = 1; tiles <= 4; ++tiles) {
        const int columns = kBatchTiles[i] / 8;
        to.registers[0][split][i][tiles - 1] = tile::Forward::registers(split, tiles, columns);
        to.registers[1][split][i][tiles - 1] = tile::Backward::registers(split, tiles, columns);
      }
    }
  }
  fill_step<step::ForwardTiles>(to, 0);
  fill_step<step::BackwardTiles>(to, 1);
  static const std::vector<CudaRowGroup> groups = row_groups();
  to.row_group_count = static_cast<int32_t>(groups.size());
  to.row_groups = groups.data();
  return to;
}

}  // namespace
}  // namespace fastrnn

extern "C" __attribute__((visibility("default"))) const fastrnn::CudaTables* fastrnn_cuda_tables() {
  static const fastrnn::CudaTables filled = fastrnn::fill();
  return &filled;
}
