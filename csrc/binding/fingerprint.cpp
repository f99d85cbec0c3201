#include "binding/fingerprint.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstring>

namespace fastrnn {
namespace {

using at::Tensor;
using at::TensorList;

// A fingerprint is int64: [0] a hash of what every call checks (addresses and version counters of
// all tensors, samples of the large ones, all numbers of the small ones), [1] the block at which
// the next call goes on reading the large ones, [2..] a hash of each of their blocks.

// The largest matrix, and the largest vector, that every call reads as a whole, in bytes.
constexpr int64_t kSmallMatrix = 4 << 10, kSmallVector = 16 << 10;
constexpr int64_t kBlock = 4 << 10;
constexpr int64_t kRowsToReadAll = 64;
constexpr int64_t kSamples = 8;
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;  // 2^64 / the golden ratio

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * kOdd;
  return hash ^ hash >> 32;
}

// Compiles a function for each of these; the best that the processor supports runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTRNN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTRNN_CLONES
#endif

constexpr int64_t kWords = 8, kStep = kWords * 8;

// Adds `steps` times 64 bytes to eight sums side by side, which compilers vectorize; a key that
// counts the steps makes the order matter (after XXH3, https://github.com/Cyan4973/xxHash).
FASTRNN_CLONES void add_steps(const char* data, int64_t steps, uint64_t* sum, uint64_t* key) {
  uint64_t sums[kWords], keys[kWords], word[kWords];
  std::memcpy(sums, sum, kStep);
  std::memcpy(keys, key, kStep);
  for (int64_t step = 0; step < steps; ++step) {
    std::memcpy(word, data + step * kStep, kStep);
    for (int64_t i = 0; i < kWords; ++i) {
      keys[i] += kOdd;
      const uint64_t mix = word[i] ^ keys[i];
      sums[i] += word[i] + (mix & 0xffffffffu) * (mix >> 32);
    }
  }
  std::memcpy(sum, sums, kStep);
  std::memcpy(key, keys, kStep);
}

uint64_t hash_of(const char* data, int64_t bytes) {
  uint64_t sum[kWords] = {}, key[kWords];
  for (int64_t i = 0; i < kWords; ++i) key[i] = kOdd * static_cast<uint64_t>(i + 1);
  const int64_t steps = bytes / kStep, rest = bytes % kStep;
  add_steps(data, steps, sum, key);
  if (rest) {
    char tail[kStep] = {};
    std::memcpy(tail, data + bytes - rest, rest);
    add_steps(tail, 1, sum, key);
  }
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (uint64_t word : sum) hash = mixed(hash, word);
  return hash;
}

// The memory from the first to the last element of a tensor on a CPU; empty for another tensor.
struct Span {
  explicit Span(const Tensor& t) {
    if (!t.is_cpu() || t.layout() != at::kStrided || t.numel() == 0) return;
    data = static_cast<const char*>(t.const_data_ptr());
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    itemsize = static_cast<int64_t>(t.itemsize());
    bytes = (last + 1) * itemsize;
    small = t.dim() < 2 ? kSmallVector : kSmallMatrix;
  }
  bool large() const { return bytes > small; }
  int64_t blocks() const { return large() ? (bytes + kBlock - 1) / kBlock : 0; }
  uint64_t hash(int64_t block) const {
    const int64_t begin = block * kBlock;
    return hash_of(data + begin, std::min(kBlock, bytes - begin));
  }

  const char* data = nullptr;
  int64_t bytes = 0, itemsize = 1, small = 0;
};

uint64_t samples_of(const Span& span) {
  uint64_t hash = 0;
  const int64_t last = span.bytes / span.itemsize - 1;
  for (int64_t k = 0; k < kSamples; ++k) {
    uint64_t bits = 0;
    std::memcpy(&bits, span.data + last * k / (kSamples - 1) * span.itemsize,
                std::min<int64_t>(span.itemsize, 8));
    hash = mixed(hash, bits);
  }
  return hash;
}

uint64_t checked_always(TensorList tensors) {
  uint64_t hash = 0;
  for (const Tensor& tensor : tensors) {
    const auto* impl = tensor.unsafeGetTensorImpl();
    hash = mixed(hash, tensor.is_inference() ? 0 : impl->version_counter().current_version());
    const Span span(tensor);
    hash = mixed(hash, reinterpret_cast<uintptr_t>(span.data));
    hash = mixed(hash, span.large() ? samples_of(span)
                       : span.data  ? hash_of(span.data, span.bytes)
                                    : 0);
  }
  return hash;
}

int64_t large_blocks(TensorList tensors) {
  int64_t count = 0;
  for (const Tensor& tensor : tensors) count += Span(tensor).blocks();
  return count;
}

// The hash of a block; the blocks of all large tensors are numbered one after the other.
uint64_t block_hash(TensorList tensors, int64_t block) {
  for (const Tensor& tensor : tensors) {
    const Span span(tensor);
    if (block < span.blocks()) return span.hash(block);
    block -= span.blocks();
  }
  return 0;
}

}  // namespace

uint64_t samples(const Tensor& tensor) {
  // A tensor that is traced has no memory, whatever its device.
  const c10::DispatchKeySet traced{c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                   c10::DispatchKey::FuncTorchBatched,
                                   c10::DispatchKey::FuncTorchGradWrapper};
  if (!tensor.is_cpu() || !tensor.has_storage() || tensor.key_set().has_any(traced)) return 0;
  const Span span(tensor);
  return span.data ? samples_of(span) : 0;
}

Tensor fingerprint(TensorList tensors) {
  const int64_t blocks = large_blocks(tensors);
  Tensor out = at::detail::empty_cpu({2 + blocks}, at::kLong);
  int64_t* to = out.mutable_data_ptr<int64_t>();
  to[0] = static_cast<int64_t>(checked_always(tensors));
  to[1] = 0;
  for (int64_t b = 0; b < blocks; ++b) to[2 + b] = static_cast<int64_t>(block_hash(tensors, b));
  return out;
}

bool unchanged(TensorList tensors, const Tensor& fingerprint, int64_t rows) {
  const int64_t blocks = large_blocks(tensors);
  TORCH_CHECK(fingerprint.is_cpu() && fingerprint.scalar_type() == at::kLong &&
                  fingerprint.dim() == 1 && fingerprint.is_contiguous(),
              "scan_packed: expected should come from fingerprint(), int64 [N] on the CPU, got ",
              fingerprint.scalar_type(), " ", fingerprint.sizes(), " on ", fingerprint.device());
  // The block to go on with is written into the fingerprint; several threads may do so at once.
  auto* from = static_cast<int64_t*>(const_cast<void*>(fingerprint.const_data_ptr()));
  if (fingerprint.size(0) != 2 + blocks || from[0] != static_cast<int64_t>(checked_always(tensors)))
    return false;
  if (blocks == 0) return true;
  const int64_t count =
      rows >= kRowsToReadAll ? blocks : (blocks * rows + kRowsToReadAll - 1) / kRowsToReadAll;
  const int64_t begin = __atomic_fetch_add(&from[1], count, __ATOMIC_RELAXED);
  for (int64_t k = begin; k < begin + count; ++k) {
    const int64_t b = k % blocks;
    if (from[2 + b] != static_cast<int64_t>(block_hash(tensors, b))) return false;
  }
  return true;
}

}  // namespace fastrnn
