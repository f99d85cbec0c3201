// Steps of a small cell of whole numbers, by one thread and by three, one of which sometimes sleeps
// in the middle of its part. Prints whether the results are equal, without and with contention, and
// whether one long sleep is remembered for longer than the shortest time.
#include "cpu/stepper.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/contention.h"

namespace {

using namespace fastrnn;

constexpr int64_t kUnits = 30, kSteps = 3000;
constexpr int kModulus = 9973;
thread_local bool caller = false;
std::atomic<int> sleepy{0};  // milliseconds

void toy_step(const StepArgs& args) {
  if (!caller) std::this_thread::sleep_for(std::chrono::milliseconds(sleepy.exchange(0)));
  const float *x = static_cast<const float*>(args.x), *h = static_cast<const float*>(args.h);
  int sum = static_cast<int>(x[0]);
  for (int64_t u = 0; u < kUnits; ++u) sum += static_cast<int>(h[u]);
  for (int64_t u = kUnits * args.part / args.parts; u < kUnits * (args.part + 1) / args.parts;
       ++u) {
    const auto next = static_cast<float>((sum + u) % kModulus);
    static_cast<float*>(args.next_h)[u] = next;
    if (args.y) static_cast<float*>(args.y)[u] = next;
  }
}

CompiledCell toy() {
  CompiledCell cell{};
  cell.states = 1;
  cell.prepacked_bytes[0] = [](const RecurrenceSizes&) { return int64_t{64}; };
  cell.step[0] = toy_step;
  cell.step_room[0] = [](const RecurrenceSizes&, int64_t) { return int64_t{0}; };
  return cell;
}

std::vector<float> run(int32_t threads, bool disturbed) {
  const CompiledCell cell = toy();
  const RecurrenceSizes layer{kUnits, kUnits, kUnits, false};
  Stepper stepper(cell, Format::kFloat, Storage::kSame, 1, {layer, layer}, threads);
  std::vector<float> x(kUnits, 3), y(kUnits);
  for (int64_t t = 0; t < kSteps; ++t) {
    if (disturbed && t % 100 == 0) contention().end();
    if (disturbed && t % 200 == 100) contention().late(nanoseconds());
    if (disturbed && t % 500 == 50) sleepy = 5;
    stepper.step(x.data(), kUnits, y.data(), kUnits);
    x[0] = y[kUnits - 1];
  }
  return y;
}

// Of many sleeps all: on a busy machine this thread may notice one too late to forget it.
bool each_sleep_is_remembered() {
  const CompiledCell cell = toy();
  const RecurrenceSizes layer{kUnits, kUnits, kUnits, false};
  Stepper stepper(cell, Format::kFloat, Storage::kSame, 1, {layer}, 3);
  std::vector<float> x(kUnits, 3), y(kUnits);
  for (int attempt = 0; attempt < 50; ++attempt) {
    contention().end();
    sleepy = 40;
    while (sleepy > 0) stepper.step(x.data(), kUnits, y.data(), kUnits);
    if (!contention().lasts()) return false;
  }
  return true;
}

}  // namespace

int main() {
  caller = true;
  const std::vector<float> right = run(1, false);
  const bool together = run(3, false) == right;
  contention().end();
  const bool disturbed = run(3, true) == right;
  std::printf("%d %d %d\n", together, disturbed, each_sleep_is_remembered());
}
