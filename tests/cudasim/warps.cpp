// Warps: how lanes meet and exchange values, and the shuffles and votes that do so.
#include "machine.h"

namespace fastrnn {
namespace sim {

void meet(const char* name, unsigned mask, void* mine, void (*combine)(void** lanes), bool orders) {
  Fiber* fiber = current();
  Warp& warp = fiber->block->warps[linear(*fiber) / 32];
  mask &= warp.exist;
  const unsigned bit = 1u << fiber->lane;
  if (!(mask & bit)) fail("%s: the mask %08x lacks lane %u itself", name, mask, fiber->lane);
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.arrived && m.mask == mask && !(m.arrived & bit)) meeting = &m;
  }
  for (Meeting& m : warp.meetings) {
    if (!meeting && !m.arrived) meeting = &m;
  }
  if (!meeting) fail("%s: more than 8 groups of lanes wait in one warp", name);
  if (!meeting->arrived) {
    meeting->mask = mask;
    meeting->name = name;
    for (void*& lane : meeting->lanes) lane = nullptr;
  } else if (std::strcmp(meeting->name, name) != 0) {
    fail("lane %u is at %s, others of its warp are at %s", fiber->lane, name, meeting->name);
  }
  char* token = &meeting->token[meeting->phase % 2];
  if (orders) release(token);
  meeting->lanes[fiber->lane] = mine;
  meeting->arrived |= bit;
  ++machine.progress;
  if (meeting->arrived == mask) {
    if (combine) combine(meeting->lanes);
    meeting->arrived = 0;
    ++meeting->phase;
    for (unsigned rest = mask & ~bit; rest; rest &= rest - 1) {
      make_ready(warp.lanes + __builtin_ctz(rest));
    }
    if (orders) maybe_yield();
  } else {
    sleep(name);
  }
  if (orders) acquire(token);
}

namespace {

struct Shuffled {
  unsigned char value[16], result[16];
  unsigned source;
};

struct Vote {
  bool predicate;
  unsigned result;
};

}  // namespace

void shuffle_bytes(const char* name, unsigned mask, void* value, size_t bytes, unsigned source) {
  Shuffled mine;
  mine.source = source;
  auto* data = static_cast<volatile unsigned char*>(value);
  for (size_t i = 0; i < bytes; ++i) mine.value[i] = data[i];
  meet(
      name, mask, &mine,
      [](void** lanes) {
        for (int i = 0; i < 32; ++i) {
          if (!lanes[i]) continue;
          auto* to = static_cast<Shuffled*>(lanes[i]);
          const auto* from = static_cast<const Shuffled*>(lanes[to->source % 32]);
          // The value of a lane that does not take part is undefined.
          for (int j = 0; j < 16; ++j) to->result[j] = from ? from->value[j] : 0xff;
        }
      },
      false);
  for (size_t i = 0; i < bytes; ++i) data[i] = mine.result[i];
}

unsigned ballot(unsigned mask, bool predicate) {
  Vote mine{predicate, 0};
  meet(
      "__ballot_sync", mask, &mine,
      [](void** lanes) {
        unsigned result = 0;
        for (int i = 0; i < 32; ++i) {
          if (lanes[i] && static_cast<const Vote*>(lanes[i])->predicate) result |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (lanes[i]) static_cast<Vote*>(lanes[i])->result = result;
        }
      },
      false);
  return mine.result;
}

}  // namespace sim
}  // namespace fastrnn
