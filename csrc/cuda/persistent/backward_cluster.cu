// The backward sweep of the residency kCluster: a cluster of blocks holds the weights of a
// recurrence.

#include "cuda/persistent/backward.cuh"

namespace fastrnn {

const PersistentKernels kBackwardCluster = persistent::entry<Direction, kCluster>();

}  // namespace fastrnn
