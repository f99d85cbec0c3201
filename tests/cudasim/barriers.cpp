// Barriers that count threads: __syncthreads, the named barriers of a block, and a cluster's
// barrier.
#include "machine.h"

namespace fastrnn {
namespace sim {

void end_phase(Counter& counter) {
  counter.arrived = 0;
  ++counter.phase;
  ++machine.progress;
  wake(counter.waiting);
}

namespace {

void count_in(Counter& counter, unsigned needed, const char* name) {
  ++machine.progress;
  if (counter.arrived && counter.needed != needed) {
    fail("%s for %u threads, where others wait for %u", name, needed, counter.needed);
  }
  counter.needed = needed;
  char* token = &counter.token[counter.phase % 2];
  release(token);
  if (++counter.arrived == needed) {
    end_phase(counter);
    maybe_yield();
  } else {
    counter.waiting.push(current());
    sleep(name, nullptr);
  }
  acquire(token);
}

}  // namespace

void block_barrier() { count_in(self->block->barriers[0], self->block->live, "__syncthreads"); }

void named_barrier(unsigned id, unsigned threads) {
  if (id >= kBarriers) fail("named_barrier %u: there are 16", id);
  if (threads % 32 != 0 || threads == 0 || threads > self->block->threads) {
    fail("named_barrier %u for %u threads of a block of %u", id, threads, self->block->threads);
  }
  static const char* const names[kBarriers] = {
      "named_barrier 0",  "named_barrier 1",  "named_barrier 2",  "named_barrier 3",
      "named_barrier 4",  "named_barrier 5",  "named_barrier 6",  "named_barrier 7",
      "named_barrier 8",  "named_barrier 9",  "named_barrier 10", "named_barrier 11",
      "named_barrier 12", "named_barrier 13", "named_barrier 14", "named_barrier 15"};
  count_in(self->block->barriers[id], threads, names[id]);
}

void cluster_arrive() {
  Fiber* fiber = current();
  Cluster& cluster = *fiber->block->cluster;
  if (fiber->arrived_in_cluster) fail("cluster_arrive twice without cluster_wait");
  fiber->arrived_in_cluster = true;
  fiber->cluster_phase = cluster.barrier.phase;
  release(&cluster.barrier.token[cluster.barrier.phase % 2]);
  ++machine.progress;
  if (++cluster.barrier.arrived == cluster.live) end_phase(cluster.barrier);
  maybe_yield();
}

void cluster_wait() {
  Fiber* fiber = current();
  Counter& barrier = fiber->block->cluster->barrier;
  if (!fiber->arrived_in_cluster) fail("cluster_wait without cluster_arrive");
  if (barrier.phase == fiber->cluster_phase) {
    barrier.waiting.push(fiber);
    sleep("cluster_wait");
  }
  acquire(&barrier.token[fiber->cluster_phase % 2]);
  fiber->arrived_in_cluster = false;
}

}  // namespace sim
}  // namespace fastrnn
