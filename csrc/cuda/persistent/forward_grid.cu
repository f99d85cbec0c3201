// The forward sweep of the residency kGrid: blocks all over the device hold the weights of a
// recurrence.

#include "cuda/persistent/forward.cuh"

namespace fastrnn {

const PersistentKernels kForwardGrid = persistent::entry<Direction, kGrid>();

}  // namespace fastrnn
