// The backward sweep of the residency kBlock: one block holds all weights of a recurrence.

#include "cuda/persistent/backward.cuh"

namespace fastrnn {

const PersistentKernels kBackwardBlock = persistent::entry<Direction, kBlock>();

}  // namespace fastrnn
