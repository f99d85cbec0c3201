#include "cpu/stepper.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/contention.h"
#include "cpu/memory.h"
#include "cpu/spin.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrnn {
namespace {

// A forked process has none of the helpers.
std::atomic<int64_t> forks{0};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++forks; });

constexpr int64_t kLine = 128;  // bytes; pairs of cache lines are fetched together
// About 200 us, a few steps of audio at 48 kHz: helpers of a stream that pauses free their cores.
constexpr int32_t kSpinsBeforeSleep = 5000;
constexpr int32_t kSpinsBeforeClock = 1000;

#ifdef __linux__
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void sleep_while(std::atomic<uint32_t>&, uint32_t) {
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}
void wake_all(std::atomic<uint32_t>&) {}
#endif

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

void Stepper::Free::operator()(char* memory) const { std::free(memory); }

Stepper::Stepper(const CompiledCell& cell, Format format, Storage storage, int64_t batch,
                 const std::vector<RecurrenceSizes>& layers, int32_t threads)
    : cell_(cell),
      kernel_(cell.step[index_of(format)]),
      format_(format),
      storage_(storage),
      batch_(batch),
      stride_(rounded(layers.front().hidden, kPadding)),
      sizes_(layers),
      threads_(threads),
      computed_bytes_(format == Format::kDouble ? 8 : 4),
      stored_bytes_(storage == Storage::kSame ? computed_bytes_ : 2),
      parts_(new Part[threads]),
      forks_(forks) {
  const int64_t L = this->layers(), buffers = 1 + cell.states;
  weights_.resize(L);
  states_.resize(L * buffers);
  args_.resize(threads * L);
  std::vector<char*> projected(L), rooms(threads);
  int64_t room = 0;
  for (const RecurrenceSizes& sizes : sizes_)
    room = std::max(room, cell.step_room[index_of(format)](sizes, batch));
  // The first pass counts the bytes, the second hands them out.
  for (int pass = 0; pass < 2; ++pass) {
    int64_t used = 0;
    char* const base = memory_.get();
    const auto take = [&](int64_t bytes) {
      char* at = base ? base + used : nullptr;
      used += rounded(bytes, kLine);
      return at;
    };
    for (int64_t l = 0; l < L; ++l) {
      weights_[l] = take(cell.prepacked_bytes[index_of(format)](sizes_[l]));
      for (int64_t k = 0; k < buffers; ++k)
        states_[l * buffers + k] = take(batch * stride_ * computed_bytes_);
      projected[l] = take(sizes_[l].projected ? batch * stride_ * computed_bytes_ : 0);
    }
    for (char*& buffer : rooms) buffer = take(room);
    x_copy_ = take(batch * inputs() * stored_bytes_);
    if (base) continue;
    memory_.reset(allocate(used));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_.get(), 0, used);  // zeroes padding and states, and touches every page
  }
  for (int32_t part = 0; part < threads; ++part)
    for (int64_t l = 0; l < L; ++l) {
      StepArgs& args = args_[part * L + l];
      args.sizes = sizes_[l];
      args.prepacked = weights_[l];
      args.x_storage = l ? Storage::kSame : storage;
      args.room = rooms[part];
      args.x_row = args.stride = stride_;
      for (int32_t s = 1; s < cell.states; ++s) args.s[s] = states_[l * buffers + 1 + s];
      args.m = projected[l];
      args.y_storage = storage;
      args.part = part;
      args.parts = threads;
    }
  if (threads == 1) return;
  helpers_ = new std::vector<std::thread>;
  for (int32_t part = 1; part < threads; ++part)
    helpers_->emplace_back([this, part] { help(part); });
}

Stepper::~Stepper() {
  if (!helpers_ || forks_ != forks) return;  // in a forked process there is nobody to join
  stop_ = true;
  ++phase_;
  wake_all(phase_);
  for (std::thread& helper : *helpers_) helper.join();
  delete helpers_;
}

int64_t Stepper::weight_bytes() const {
  int64_t bytes = 0;
  for (const RecurrenceSizes& sizes : sizes_)
    bytes += cell_.prepacked_bytes[index_of(format_)](sizes);
  return bytes;
}

void Stepper::set_weights(int64_t layer, const void* prepacked) {
  std::memcpy(weights_[layer], prepacked, cell_.prepacked_bytes[index_of(format_)](sizes_[layer]));
}

void Stepper::step(const void* x, int64_t x_row, void* y, int64_t y_row, int64_t rows) {
  const auto extent = [&](const void* base, int64_t row, int64_t width) {
    const char* first = static_cast<const char*>(base);
    const char* last = first + (rows - 1) * row * stored_bytes_;
    return std::make_pair(std::min(first, last), std::max(first, last) + width * stored_bytes_);
  };
  const auto read = extent(x, x_row, inputs()), written = extent(y, y_row, outputs());
  if (read.first < written.second && written.first < read.second) {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(x_copy_ + i * inputs() * stored_bytes_,
                  static_cast<const char*>(x) + i * x_row * stored_bytes_,
                  inputs() * stored_bytes_);
    x = x_copy_;
    x_row = inputs();
  }
  x_ = x;
  y_ = y;
  x_row_ = x_row;
  y_row_ = y_row;
  rows_ = rows;
  const int64_t begin = threads_ > 1 && contention().remembered() ? nanoseconds() : 0;
  alone_ = threads_ == 1 || (begin && contention().lasts(begin));
  late_ = false;
  for (layer_ = 0; layer_ < layers(); ++layer_) {
    project_ = false;
    run_phase();
    if (!sizes_[layer_].projected) continue;
    project_ = true;
    run_phase();
  }
  odd_ = !odd_;
  if (begin && !alone_ && !late_) contention().undisturbed(nanoseconds() - begin);
}

// Runs one part of the phase.
void Stepper::run(int32_t part) {
  const int64_t L = layers(), buffers = 1 + cell_.states;
  StepArgs& args = args_[part * L + layer_];
  args.h = states_[layer_ * buffers + odd_];
  args.next_h = states_[layer_ * buffers + !odd_];
  args.batch = rows_;
  args.descending = odd_;
  args.project = project_;
  if (layer_ == 0) {
    args.x = x_;
    args.x_row = x_row_;
  } else {
    args.x = states_[(layer_ - 1) * buffers + !odd_];
  }
  if (layer_ == L - 1) {
    args.y = y_;
    args.y_row = y_row_;
  }
  kernel_(args);
}

bool Stepper::run_if_free(int32_t part, uint32_t phase) {
  uint32_t before = phase - 1;
  if (!parts_[part].begun.compare_exchange_strong(before, phase)) return false;
  run(part);
  parts_[part].done.store(phase, std::memory_order_release);
  return true;
}

void Stepper::run_phase() {
  if (alone_) {
    for (int32_t part = 0; part < threads_; ++part) run(part);
    return;
  }
  // Sequentially consistent, like the helpers' side: either they see the phase, or this thread sees
  // them asleep.
  const uint32_t phase = ++phase_;
  if (layer_ == 0 && !project_ && asleep_ > 0) wake_all(phase_);
  run(0);
  for (int32_t part = 1; part < threads_; ++part) run_if_free(part, phase);
  for (int32_t part = 1; part < threads_; ++part) wait_for(part, phase);
}

// Waits for a part that a helper has begun.
void Stepper::wait_for(int32_t part, uint32_t phase) {
  int64_t since = 0;
  for (int32_t spins = 0; parts_[part].done.load(std::memory_order_acquire) != phase;) {
    cpu_relax();
    if (++spins < kSpinsBeforeClock) continue;
    spins = 0;
    const int64_t now = nanoseconds();
    if (since == 0) since = now;
    if (now - since < kLate) continue;
    if (!late_) contention().late(now);
    late_ = true;
    sched_yield();
  }
}

void Stepper::help(int32_t part) {
  for (uint32_t seen = 0;;) {
    for (int32_t spins = 0; phase_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < kSpinsBeforeSleep) {
        cpu_relax();
        continue;
      }
      ++asleep_;
      while (phase_ == seen) sleep_while(phase_, seen);
      --asleep_;
    }
    if (stop_) return;
    seen = phase_;
    run_if_free(part, seen);
  }
}

char* Stepper::state(int64_t layer, int32_t s) const {
  return states_[layer * (1 + cell_.states) + (s ? 1 + s : odd_)];
}

void Stepper::reset() {
  for (int64_t l = 0; l < layers(); ++l)
    for (int32_t s = 0; s < cell_.states; ++s)
      std::memset(state(l, s), 0, batch_ * stride_ * computed_bytes_);
}

void Stepper::read(int32_t s, void* to) const {
  const int64_t row = width(s) * computed_bytes_;
  char* at = static_cast<char*>(to);
  for (int64_t l = 0; l < layers(); ++l)
    for (int64_t i = 0; i < batch_; ++i, at += row)
      std::memcpy(at, state(l, s) + i * stride_ * computed_bytes_, row);
}

void Stepper::write(int32_t s, const void* from) {
  const int64_t row = width(s) * computed_bytes_;
  const char* at = static_cast<const char*>(from);
  for (int64_t l = 0; l < layers(); ++l)
    for (int64_t i = 0; i < batch_; ++i, at += row)
      std::memcpy(state(l, s) + i * stride_ * computed_bytes_, at, row);
}

void Stepper::read_row(int64_t row, char* to) const {
  for (int64_t l = 0; l < layers(); ++l)
    for (int32_t s = 0; s < cell_.states; ++s, to += stride_bytes())
      std::memcpy(to, state(l, s) + row * stride_bytes(), stride_bytes());
}

void Stepper::write_row(int64_t row, const char* from) {
  for (int64_t l = 0; l < layers(); ++l)
    for (int32_t s = 0; s < cell_.states; ++s, from += stride_bytes())
      std::memcpy(state(l, s) + row * stride_bytes(), from, stride_bytes());
}

}  // namespace fastrnn
