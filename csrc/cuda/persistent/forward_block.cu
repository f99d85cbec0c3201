// The forward sweep of the residency kBlock: one block holds all weights of a recurrence.

#include "cuda/persistent/forward.cuh"

namespace fastrnn {

const PersistentKernels kForwardBlock = persistent::entry<Direction, kBlock>();

}  // namespace fastrnn
