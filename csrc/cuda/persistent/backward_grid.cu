// The backward sweep of the residency kGrid: blocks all over the device hold the weights of a
// recurrence.

#include "cuda/persistent/backward.cuh"

namespace fastrnn {

const PersistentKernels kBackwardGrid = persistent::entry<Direction, kGrid>();

}  // namespace fastrnn
