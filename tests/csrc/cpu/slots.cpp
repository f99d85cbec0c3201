// Streams of a small cell of whole numbers in slots, and each in a stepper of its own. Prints the
// number of frames whose output differs, of all frames.
#include "cpu/slots.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace fastrnn;

constexpr int64_t kInputs = 3, kUnits = 5, kSlots = 300, kMoves = 60, kMostSteps = 3;
constexpr int kModulus = 9973;

// Two states: h, and a sum of all inputs.
void toy_step(const StepArgs& args) {
  const int64_t I = args.sizes.inputs;
  for (int64_t i = 0; i < args.batch; ++i) {
    const float* x = static_cast<const float*>(args.x) + i * args.x_row;
    const float* h = static_cast<const float*>(args.h) + i * args.stride;
    float* next = static_cast<float*>(args.next_h) + i * args.stride;
    float* sums = static_cast<float*>(args.s[1]) + i * args.stride;
    int sum = 0;
    for (int64_t k = 0; k < I; ++k) sum += static_cast<int>(x[k]);
    for (int64_t u = 0; u < kUnits; ++u) sum += static_cast<int>(h[u]);
    for (int64_t u = kUnits * args.part / args.parts; u < kUnits * (args.part + 1) / args.parts;
         ++u) {
      sums[u] = static_cast<float>((static_cast<int>(sums[u]) + sum) % kModulus);
      next[u] = static_cast<float>((sum + static_cast<int>(sums[u]) + u) % kModulus);
      if (args.y) static_cast<float*>(args.y)[i * args.y_row + u] = next[u];
    }
  }
}

CompiledCell toy() {
  CompiledCell cell{};
  cell.states = 2;
  cell.prepacked_bytes[0] = [](const RecurrenceSizes&) { return int64_t{64}; };
  cell.step[0] = toy_step;
  cell.step_room[0] = [](const RecurrenceSizes&, int64_t batch) { return batch * 4; };
  return cell;
}

}  // namespace

int main(int, char** arguments) {
  const CompiledCell cell = toy();
  const std::vector<RecurrenceSizes> layers{{kInputs, kUnits, kUnits, false},
                                            {kUnits, kUnits, kUnits, false}};
  Slots slots(cell, Format::kFloat, Storage::kSame, kSlots, layers, std::atoi(arguments[1]));
  std::map<int64_t, std::unique_ptr<Stepper>> steppers;
  std::mt19937 draw(0);
  int64_t wrong = 0, frames = 0;
  for (int64_t move = 0; move < kMoves; ++move) {
    for (int64_t k = draw() % (kSlots / 4); k > 0; --k) {
      const int64_t slot = slots.add();
      if (slot < 0) {
        wrong += slots.size() != kSlots;
        break;
      }
      steppers[slot] =
          std::make_unique<Stepper>(cell, Format::kFloat, Storage::kSame, 1, layers, 1);
    }
    std::vector<int64_t> chosen;
    for (const auto& entry : steppers)
      if (draw() % 3) chosen.push_back(entry.first);
    const auto n = static_cast<int64_t>(chosen.size()),
               steps = static_cast<int64_t>(draw() % kMostSteps);
    std::vector<float> x(n * steps * kInputs), y(n * steps * kUnits), expected(kUnits);
    for (float& each : x) each = static_cast<float>(draw() % 100);
    const auto data = [](std::vector<float>& numbers) {
      return reinterpret_cast<char*>(numbers.data());
    };
    slots.run(chosen.data(), n, steps, {data(x), steps * kInputs, kInputs},
              {data(y), steps * kUnits, kUnits});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < steps; ++t, ++frames) {
        const int64_t at = i * steps + t;
        steppers[chosen[i]]->step(&x[at * kInputs], kInputs, expected.data(), kUnits);
        wrong += std::vector<float>(&y[at * kUnits], &y[at * kUnits] + kUnits) != expected;
      }
    for (const int64_t slot : chosen) {
      std::vector<float> ours(2 * kUnits), theirs(2 * kUnits);
      for (int32_t s = 0; s < 2; ++s) {
        slots.read(slot, s, ours.data());
        steppers[slot]->read(s, theirs.data());
        wrong += ours != theirs;
        slots.write(slot, s, ours.data());
      }
      if (draw() % 8) continue;
      slots.remove(slot);
      steppers.erase(slot);
    }
    wrong += slots.size() != static_cast<int64_t>(steppers.size());
  }
  std::printf("%lld %d\n", static_cast<long long>(wrong), frames > 3000);
}
