// A sweep of a few numbers, with a member that comes late. It prints, for each case, its name,
// whether a member was late, how often a thread alone ran the sweep, and whether the numbers are
// right.
#include "cpu/team.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/contract.h"
#include "threads.h"

namespace {

using namespace fastrnn;

constexpr int kSteps = 200, kUnits = 12, kModulus = 9973;
constexpr auto kNap = std::chrono::milliseconds(50);

struct Args {
  int* sums;             // [kUnits], changed in place by every step
  int late_at = -1;      // the step before which the last member sleeps; 0: before the first
  int* alone = nullptr;  // how often a thread alone ran the sweep
  bool* late = nullptr;
};

// unit'[u] = sum of all units + u, modulo a prime; sums[u] += unit'[u].
template <bool kBreakable>
class Numbers {
 public:
  Numbers(const Args& args, const CpuPlan& plan) : args_(args), plan_(plan) {}
  void place(Arena& arena) {
    for (int*& buffer : units_) buffer = arena.take<int>(kUnits);
  }
  static constexpr bool kRepeatable = kBreakable;
  template <class Visit>
  void each_changed(const Visit& visit) const {
    visit(args_.sums, kUnits * sizeof(int));
  }
  void thread(Member& me) const {
    if (plan_.threads() == 1) ++*args_.alone;
    const Range own = part_of(kUnits, plan_.threads(), me.index);
    sleep(me, 0);
    for (int64_t u = own.begin; u < own.end; ++u) units_[0][u] = static_cast<int>(u);
    me.publish(1);
    me.wait_for_all(1);
    for (int step = 1; step <= kSteps; ++step) {
      sleep(me, step);
      int sum = 0;
      for (int u = 0; u < kUnits; ++u) sum += units_[(step - 1) & 1][u];
      for (int64_t u = own.begin; u < own.end; ++u) {
        const int next = static_cast<int>((sum + u) % kModulus);
        units_[step & 1][u] = next;
        args_.sums[u] = (args_.sums[u] + next) % kModulus;
      }
      me.publish(1 + step);
      me.wait_for_all(1 + step);
    }
  }

 private:
  void sleep(const Member& me, int step) const {
    if (step != args_.late_at || me.index == 0 || me.index + 1 != plan_.threads()) return;
    // Until the others have noticed, which takes long on a busy machine. Where the team does not
    // break up, nothing tells.
    int naps = kBreakable && plan_.split_units > 1 ? 1000 : 10;
    while (naps-- > 0 && !me.broken()) std::this_thread::sleep_for(kNap);
  }

  const Args& args_;
  const CpuPlan& plan_;
  int* units_[2] = {};
};

template <class Sweep>
void run(const char* name, int32_t units, int32_t sequences, int late_at,
         const std::vector<int>& right) {
  std::vector<int> sums(kUnits, 1);
  int alone = 0;
  bool late = false;
  CpuPlan plan;
  plan.split_units = units;
  plan.split_sequences = sequences;
  const bool ran = run_sweep<Sweep>(Args{sums.data(), late_at, &alone, &late}, plan);
  std::printf("%s %d %d %d\n", name, late, alone, ran && sums == right);
}

}  // namespace

int main() {
  std::vector<int> right(kUnits, 1);
  int alone = 0;
  run_sweep<Numbers<true>>(Args{right.data(), -1, &alone}, CpuPlan{});
  run<Numbers<true>>("nobody", 3, 1, -1, right);
  run<Numbers<true>>("start", 3, 1, 0, right);
  run<Numbers<true>>("step", 3, 1, 7, right);
  run<Numbers<true>>("last", 3, 1, kSteps, right);
  run<Numbers<false>>("unrepeatable", 3, 1, 7, right);
  run<Numbers<true>>("sequences", 1, 3, 0, right);
}
