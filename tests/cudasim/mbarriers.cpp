// mbarriers, which count arrivals and bytes, and the stores into other blocks of a cluster
// (st.async) that land later and arrive at them.
#include <utility>

#include "machine.h"

namespace fastrnn {
namespace sim {
namespace {

// The 64 bits of an mbarrier in shared memory hold kBarrierTag and an index of Block::mbarriers.
constexpr uint64_t kBarrierTag = 0x6d62617272000000, kBarrierTagMask = ~uint64_t{0xffffff};
constexpr int64_t kMaxBytes = (1 << 20) - 1;
// The address of a peer's memory has 4 bits that no plain offset has, the rank and an offset. A sum
// that leaves the offset's bits stays visible.
constexpr uint32_t kPeerTag = 0xa0000000, kOffsetBits = 20;

MBarrier& find_barrier(Block& block, const void* place, uint64_t value) {
  const size_t index = value & ~kBarrierTagMask;
  if ((value & kBarrierTagMask) != kBarrierTag || index >= block.mbarriers.size() ||
      block.mbarriers[index].place != place) {
    fail("no mbarrier has been initialised at byte %zu of the shared memory of %s",
         static_cast<size_t>(static_cast<const unsigned char*>(place) - block.shared),
         place_of(&block).c_str());
  }
  return block.mbarriers[index];
}

void end_phase_if_complete(MBarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  ++b.phase;
  wake(b.waiting);
}

void count_bytes(MBarrier& b, int64_t bytes) {
  b.bytes += bytes;
  if (b.bytes > kMaxBytes || b.bytes < -kMaxBytes) {
    fail("an mbarrier expects %lld bytes, more than it can count", static_cast<long long>(b.bytes));
  }
}

}  // namespace

void land_one() {
  const Quiet quiet;
  std::swap(machine.stores[machine.random.below(machine.stores.size())], machine.stores.back());
  const std::unique_ptr<Store> s = std::move(machine.stores.back());
  machine.stores.pop_back();
  ++machine.progress;
  Block& target = *s->target;
  auto* place = reinterpret_cast<uint64_t*>(target.shared + s->barrier_offset);
  MBarrier& b = find_barrier(target, place, *place);
  unsigned char* data = target.shared + s->offset;
#if defined(CUDASIM_THREAD)
  const Fiber* fiber = current();
  __tsan_switch_to_fiber(b.agent, kNoOrder);
  acquire(s.get());
  __tsan_write_range(data, kStoreBytes);
  release(&b.token);
  __tsan_switch_to_fiber(fiber ? fiber->tsan : machine.tsan, kNoOrder);
#endif
  for (unsigned i = 0; i < kStoreBytes; ++i) data[i] = s->value[i];
  count_bytes(b, -int64_t{kStoreBytes});
  end_phase_if_complete(b);
}

uint64_t new_barrier(uint64_t* b, unsigned count) {
  const Quiet quiet;
  if (count == 0 || count > kMaxBytes) fail("barrier_init for %u arrivals", count);
  auto& all = self->block->mbarriers;
  if (all.size() == all.capacity()) fail("more than %zu mbarriers in a block", all.capacity());
  all.emplace_back(b, count);
#if defined(CUDASIM_THREAD)
  all.back().agent = clocks.take();
#endif
  return kBarrierTag | (all.size() - 1);
}

void barrier_arrive(uint64_t* place, uint64_t value, unsigned bytes) {
  MBarrier& b = find_barrier(*self->block, place, value);
  ++machine.progress;
  release(&b.token);
  count_bytes(b, bytes);
  --b.pending;  // wraps below 0 where the phase has all arrivals but waits for bytes
  if (b.pending > b.count) fail("more arrivals at an mbarrier than the %u it counts", b.count);
  end_phase_if_complete(b);
  maybe_yield();
}

bool barrier_passed(uint64_t* place, uint64_t value, unsigned parity) {
  MBarrier& b = find_barrier(*self->block, place, value);
  if (parity > 1) fail("barrier_wait for parity %u", parity);
  if (b.phase % 2 == parity) {
    b.waiting.push(current());
    sleep(parity ? "barrier_wait, parity 1" : "barrier_wait, parity 0", place);
    return false;
  }
  acquire(&b.token);
  return true;
}

uint32_t peer_address(const void* shared, unsigned rank) {
  check_shared("peer_address", shared, 1, 1);
  if (rank >= self->block->cluster->blocks.size()) {
    fail("peer_address: rank %u in a cluster of %zu", rank, self->block->cluster->blocks.size());
  }
  const auto* at = static_cast<const unsigned char*>(shared);
  return kPeerTag | rank << kOffsetBits | static_cast<uint32_t>(at - self->block->shared);
}

void st_async16(uint32_t peer_data, const void* value, uint32_t peer_barrier) {
  constexpr uint32_t offset_mask = (1u << kOffsetBits) - 1;
  const auto& blocks = self->block->cluster->blocks;
  const uint32_t rank = (peer_data & ~kPeerTag) >> kOffsetBits;
  const uint32_t offset = peer_data & offset_mask, barrier_offset = peer_barrier & offset_mask;
  if ((peer_data & 0xf0000000) != kPeerTag || rank >= blocks.size() ||
      offset + kStoreBytes > shape.shared_bytes || offset % kStoreBytes != 0) {
    fail("st_async16: %08x is no aligned address in a block of the cluster", peer_data);
  }
  if (peer_data >> kOffsetBits != peer_barrier >> kOffsetBits || barrier_offset % 8 != 0 ||
      barrier_offset + 8 > shape.shared_bytes) {
    fail("st_async16: %08x is no barrier in the block of %08x", peer_barrier, peer_data);
  }
  Block* target = blocks[rank];
  if (target->live == 0) {
    fail("st_async16 into the shared memory of %s, which has ended", place_of(target).c_str());
  }
#if defined(CUDASIM_THREAD)
  // From now on nobody may use what the store overwrites, and the barrier must be there.
  __tsan_write_range(target->shared + offset, kStoreBytes);
  __tsan_read_range(target->shared + barrier_offset, 8);
#endif
  {
    const Quiet quiet;
    auto s = std::make_unique<Store>();
    s->target = target;
    s->offset = offset;
    s->barrier_offset = barrier_offset;
    s->from = current();
    std::memcpy(s->value, value, kStoreBytes);
    release(s.get());
    machine.stores.push_back(std::move(s));
  }
  ++machine.progress;
  maybe_yield();
}

}  // namespace sim
}  // namespace fastrnn
