// The tiles of the step kernels: the part that a block computes, and how its warps share it.
#pragma once

namespace fastrnn {
namespace step {

// A warp multiplies 16 * kTilesM rows by 8 * kTilesN units. Warps lie side by side along rows,
// units and the depth; small tiles split the depth, because they need many loads in flight.
template <int tiles_m, int tiles_n, int warps_m, int warps_n, int warps_k, int depth_bytes,
          int stages>
struct Shape {
  static constexpr int kTilesM = tiles_m, kTilesN = tiles_n;
  static constexpr int kWarpsM = warps_m, kWarpsN = warps_n, kWarpsK = warps_k;
  static constexpr int kRows = 16 * tiles_m * warps_m;
  static constexpr int kUnits = 8 * tiles_n * warps_n;
  static constexpr int kThreads = 32 * warps_m * warps_n * warps_k;
  static constexpr int kDepthBytes = depth_bytes;  // of a row, for each stage of the pipeline
  static constexpr int kStages = stages;
  static constexpr int kPerThread = kRows * kUnits / kThreads;
  static_assert(kPerThread * kThreads == kRows * kUnits, "threads share a tile evenly");
  static_assert(kRows <= kThreads, "a thread for each row");
};

// Rows of the batch x units (of every gate) of a block.
struct ForwardTiles {
  using Small = Shape<1, 1, 1, 1, 4, 256, 4>;   // 16 x 8
  using Middle = Shape<1, 2, 2, 1, 2, 128, 4>;  // 32 x 16
  using Large = Shape<2, 2, 2, 2, 1, 128, 3>;   // 64 x 32
};

// Rows of the batch x units of a block.
struct BackwardTiles {
  using Small = Shape<1, 2, 1, 1, 4, 256, 4>;   // 16 x 16
  using Middle = Shape<1, 2, 2, 1, 4, 256, 3>;  // 32 x 16
  using Large = Shape<2, 2, 2, 2, 2, 128, 3>;   // 64 x 32
};

}  // namespace step
}  // namespace fastrnn
