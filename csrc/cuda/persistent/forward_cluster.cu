// The forward sweep of the residency kCluster: a cluster of blocks holds the weights of a
// recurrence.

#include "cuda/persistent/forward.cuh"

namespace fastrnn {

const PersistentKernels kForwardCluster = persistent::entry<Direction, kCluster>();

// The same for all kernels of the residency: each runs one block per multiprocessor.
int resident_clusters(int blocks, int threads, int64_t shared_bytes) {
  return with_cell(0, [&](auto cell) {
    using Cell = decltype(cell);
    constexpr int kUnits = Direction::row_groups(Cell::kGates, 1).units[0];
    using X = Direction::Traits<Cell, Precision::kBfloat16, kUnits, 1>;
    return platform::resident_clusters(persistent_forward<X, kCluster>, blocks, threads,
                                       shared_bytes);
  });
}

}  // namespace fastrnn
