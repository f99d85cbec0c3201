// The scheduler: which thread runs next, by the seed; how a thread waits; and the flags that
// threads poll. A seed decides every choice, so the same seed gives the same interleaving.
#include <cstdlib>
#include <utility>

#include "machine.h"

namespace fastrnn {
namespace sim {

uint64_t seed_given = [] {
  const char* text = std::getenv("FASTRNN_CUDASIM_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0;
}();

namespace {

uint64_t launches = 0;  // since the seed was given

uint64_t favour_of(const Fiber* fiber) {
  const uint3 block = fiber->block->index;
  uint64_t id = block.x + (uint64_t{block.y} << 20) + (uint64_t{block.z} << 40);
  if (machine.favours_warps) id = id * 64 + linear(*fiber) / 32;
  return (id ^ machine.favour) * 0x9e3779b97f4a7c15 >> 16;
}

Fiber* take_ready() {
  const size_t mask = machine.ready.size() - 1;
  Fiber*& first = machine.ready[machine.ready_first & mask];
  if (machine.shuffled) {
    if (machine.random.below(256) == 0) machine.favour = machine.random.next();
    size_t best = machine.random.below(machine.ready_count);
    for (unsigned i = 1; i < machine.choices; ++i) {
      const size_t other = machine.random.below(machine.ready_count);
      if (favour_of(machine.ready[(machine.ready_first + other) & mask]) >
          favour_of(machine.ready[(machine.ready_first + best) & mask])) {
        best = other;
      }
    }
    std::swap(first, machine.ready[(machine.ready_first + best) & mask]);
  }
  ++machine.ready_first;
  --machine.ready_count;
  return first;
}

void notice_progress() {
  if (machine.progress == machine.progress_seen) return;
  machine.progress_seen = machine.progress;
  machine.idle_polls = machine.idle_rounds = 0;
}

}  // namespace

void draw_schedule() {
  machine.random.seed(seed_given, launches++);
  machine.shuffled = seed_given != 0;
  static constexpr unsigned choices[] = {1, 4, 16, 64};
  machine.choices = machine.shuffled ? choices[machine.random.below(4)] : 1;
  machine.favour = machine.random.next();
  machine.favours_warps = machine.random.below(2) != 0;
  static constexpr unsigned odds[] = {1, 8, 128, 100000};
  machine.land_one_in = machine.shuffled ? odds[machine.random.below(4)] : 64;
  static constexpr unsigned early[] = {0, 1, 2, 4};
  machine.early_one_in = machine.shuffled ? early[machine.random.below(4)] : 0;
}

void run_another() {
  if (!machine.stores.empty() && machine.random.below(machine.land_one_in) == 0) land_one();
  while (machine.ready_count == 0) {
    if (!machine.stores.empty()) {
      land_one();
      continue;
    }
    // The flags that threads poll may have changed meanwhile, so each thread looks again, but not
    // for ever if nothing comes of it.
    notice_progress();
    if (!machine.pollers.first || ++machine.idle_rounds > 3) deadlock();
    wake(machine.pollers);
  }
  switch_to(take_ready());
}

void sleep(const char* what, const void* where) {
  current()->waits = what;
  current()->waits_at = where;
  run_another();
  current()->waits = nullptr;
}

void yield() {
  make_ready(current());
  run_another();
}

void polled(const uint32_t* flag, uint32_t value) {
  Fiber* fiber = current();
  if (fiber->flag == flag && fiber->flag_value == value &&
      fiber->flag_releases == machine.releases) {
    machine.pollers.push(fiber);
    sleep("load_acquire", flag);
    return;
  }
  if (fiber->flag != flag || fiber->flag_value != value) fiber->flag = flag;
  fiber->flag_value = value;
  fiber->flag_releases = machine.releases;
  notice_progress();
  if (++machine.idle_polls > 100000 + 1000 * machine.fibers.size()) {
    fiber->waits = "load_acquire";
    fiber->waits_at = flag;
    deadlock();
  }
  yield();
}

void released() {
  ++machine.releases;
  ++machine.progress;
  wake(machine.pollers);
  maybe_yield();
}

}  // namespace sim
}  // namespace fastrnn

// Decides the order in which the threads of the following launches run. They run in turn if the
// seed is 0.
extern "C" void fastrnn_cudasim_seed(uint64_t seed) {
  fastrnn::sim::seed_given = seed;
  fastrnn::sim::launches = 0;
}
