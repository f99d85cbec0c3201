// Launches: the blocks and threads of a kernel from their start to their end. cudasim.h is the
// interface. Files of this folder are compiled without -fsanitize, but with -DCUDASIM_ADDRESS or
// -DCUDASIM_THREAD for kernels that are compiled with it.
#include <cstdlib>
#include <mutex>
#include <utility>

#include "machine.h"

namespace fastrnn {
namespace sim {

Thread* self = nullptr;
Shape shape{};
int planted = 0;
Machine machine;
const BlockFacts& facts() { return *self->block; }

void finish_thread() {
  Fiber* fiber = current();
  Block& block = *fiber->block;
  Cluster& cluster = *block.cluster;
  {
    const Quiet quiet;
    for (const Copy& copy : fiber->copies) {
      std::memcpy(copy.shared, copy.global ? copy.global : "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16);
    }
  }
  ++machine.progress;
  // A thread that has ended counts as arrived at __syncthreads and at the cluster's barrier.
  Counter& barrier = block.barriers[0];
  --block.live;
  if (barrier.arrived) {
    barrier.needed = block.live;
    if (barrier.arrived == barrier.needed) end_phase(barrier);
  }
  if (fiber->arrived_in_cluster) {
    fail("a thread ends between cluster_arrive and cluster_wait");
  }
  --cluster.live;
  if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.live) {
    end_phase(cluster.barrier);
  }
  if (block.live == 0) {
    for (const auto& s : machine.stores) {
      if (s->target == &block) {
        fail("%s ends while %s still stores into its shared memory, at byte %u",
             place_of(&block).c_str(), place_of(s->from->block).c_str(), s->offset);
      }
    }
    for (const MBarrier& b : block.mbarriers) {
      if (b.bytes != 0) {
        fail("%s ends while its barrier at byte %zu of shared memory still expects %lld bytes",
             place_of(&block).c_str(),
             static_cast<size_t>(reinterpret_cast<unsigned char*>(b.place) - block.shared),
             static_cast<long long>(b.bytes));
      }
    }
  }
  release(&machine.end_token);
  fiber->done = true;
  if (--machine.live == 0) switch_to(nullptr);
  run_another();
}

namespace {

std::mutex one_launch;

// Runs blocks that are certain to run at the same time: a cluster, or the grid of a cooperative
// launch.
void run_together(unsigned first, unsigned count) {
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  std::vector<Block> blocks(count);
  std::vector<Cluster> clusters(count / shape.cluster);
  machine.fibers = std::vector<Fiber>(static_cast<size_t>(count) * threads);
#if defined(CUDASIM_THREAD)
  clocks.begin_batch(machine.fibers.size());
#endif
  machine.live = machine.fibers.size();
  size_t ring = 1;
  while (ring < machine.fibers.size()) ring *= 2;
  machine.ready.assign(ring, nullptr);
  machine.ready_first = machine.ready_count = 0;
  machine.pollers = List{};
  for (unsigned i = 0; i < count; ++i) {
    Block& block = blocks[i];
    const unsigned id = first + i;
    block.index = {id % shape.grid.x, id / shape.grid.x % shape.grid.y,
                   id / shape.grid.x / shape.grid.y};
    block.rank = id % shape.cluster;
    void* shared = nullptr;
    if (posix_memalign(&shared, 1024, shape.shared_bytes ? shape.shared_bytes : 1)) std::abort();
    std::memset(shared, 0xff, shape.shared_bytes);
    block.shared = static_cast<unsigned char*>(shared);
    block.threads = block.live = threads;
    block.cluster = &clusters[i / shape.cluster];
    block.cluster->blocks.push_back(&block);
    block.cluster->live += threads;
    block.warps.resize((threads + 31) / 32);
    block.mbarriers.reserve(64);
    for (unsigned j = 0; j < threads; ++j) {
      Fiber& fiber = machine.fibers[static_cast<size_t>(i) * threads + j];
      fiber.index = {j % shape.block.x, j / shape.block.x % shape.block.y,
                     j / shape.block.x / shape.block.y};
      fiber.lane = j % 32;
      fiber.block = &block;
      prepare_stack(fiber, static_cast<size_t>(i) * threads + j);
      Warp& warp = block.warps[j / 32];
      if (j % 32 == 0) warp.lanes = &fiber;
      warp.exist |= 1u << (j % 32);
#if defined(CUDASIM_THREAD)
      fiber.tsan = clocks.take();
#endif
      make_ready(&fiber);
    }
  }
  self = nullptr;
  run_another();
  self = nullptr;
#if defined(CUDASIM_THREAD)
  // On stacks that serve again, the sanitizer would take one thread's variables for another's.
  drop_stacks();
#endif
  machine.stores.clear();
  machine.fibers.clear();
  for (const Block& block : blocks) std::free(block.shared);
  if (machine.failed) drop_stacks();
}

}  // namespace

int launch(const Shape& wanted, void (*kernel)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const dim3 grid = wanted.grid, block = wanted.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMaxThreads || block.z > 64 || wanted.cluster == 0 ||
      wanted.cluster > kMaxCluster || grid.x % wanted.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (wanted.shared_bytes > kMaxShared) return cudaErrorInvalidValue;
  shape = wanted;
  machine.kernel = kernel;
  machine.context = context;
  machine.failed = false;
  ++machine.progress;
  draw_schedule();
#if defined(CUDASIM_THREAD)
  machine.tsan = __tsan_get_current_fiber();
  clocks.begin_launch();
#endif
#if defined(CUDASIM_ADDRESS)
  machine.stack = nullptr;
#endif
  const auto batch = static_cast<unsigned>(wanted.cooperative ? blocks : wanted.cluster);
  const auto batches = static_cast<unsigned>(blocks / batch);
  std::vector<unsigned> order(batches);
  for (unsigned i = 0; i < batches; ++i) order[i] = i;
  for (unsigned i = batches; machine.shuffled && i > 1; --i) {
    std::swap(order[i - 1], order[machine.random.below(i)]);
  }
  for (unsigned i = 0; i < batches && !machine.failed; ++i) {
    run_together(order[i] * batch, batch);
  }
  acquire(&machine.end_token);
  return machine.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int resident_clusters(int blocks, size_t shared_bytes) {
  if (blocks < 1 || blocks > static_cast<int>(kMaxCluster)) return -cudaErrorInvalidValue;
  return shared_bytes > kMaxShared ? 0 : 128 / blocks;
}

}  // namespace sim
}  // namespace fastrnn

// Decides which of the faults planted in the sources the following launches make; 0 for none.
extern "C" void fastrnn_cudasim_plant(int fault) { fastrnn::sim::planted = fault; }
