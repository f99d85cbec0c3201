#include "binding/output_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "cpu/memory.h"

namespace fastrnn {
namespace {

// glibc may use smaller blocks again by itself.
constexpr size_t kLeast = size_t{32} << 20;

// Blocks that no tape uses.
class FreeBlocks {
 public:
  // The oldest one of this size, or null.
  char* take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = std::find_if(blocks_.begin(), blocks_.end(),
                                    [&](const Block& block) { return block.bytes == bytes; });
    if (found == blocks_.end()) return nullptr;
    char* const data = found->data;
    held_ -= bytes;
    blocks_.erase(found);
    return data;
  }

  // Holds a block, and frees the oldest ones if all together would be too much.
  void give_back(char* data, size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || bytes > kMost) return std::free(data);
    blocks_.push_back({data, bytes});
    held_ += bytes;
    for (; held_ > kMost; blocks_.erase(blocks_.begin())) {
      held_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
    }
  }

 private:
  static constexpr size_t kMost = size_t{256} << 20;
  struct Block {
    char* data;
    size_t bytes;
  };

  // It is tried, never waited for: in a child process, the thread that holds it may not exist.
  std::mutex mutex_;
  std::vector<Block> blocks_;  // the oldest first
  size_t held_ = 0;
};

// Never destroyed: tensors may outlive everything else.
FreeBlocks& free_blocks() {
  static FreeBlocks* const blocks = new FreeBlocks;
  return *blocks;
}

// Sizes in steps of an eighth or less, so that batches of nearly the same size share blocks.
size_t rounded(size_t bytes) {
  size_t step = kHugePage;
  while (16 * step <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

Tensor fresh(at::IntArrayRef size, at::ScalarType type) {
  Tensor out = at::detail::empty_cpu(size, type);
  if (out.nbytes() >= 2 * kHugePage) prefer_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

Tensor fresh_zeros(at::IntArrayRef size, at::ScalarType type) {
  Tensor out = fresh(size, type);
  if (out.nbytes() > 0) std::memset(out.mutable_data_ptr(), 0, out.nbytes());
  return out;
}

Tensor tape_memory(at::IntArrayRef size, at::ScalarType type) {
  const size_t wanted = c10::multiply_integers(size) * c10::elementSize(type);
  if (wanted < kLeast) return fresh(size, type);
  const size_t bytes = rounded(wanted);
  char* data = free_blocks().take(bytes);
  if (!data) data = allocate(bytes);
  TORCH_CHECK_WITH(OutOfMemoryError, data, "fastrnn: no memory for ", bytes,
                   " bytes of saved values");
  return at::from_blob(
      data, size,
      [bytes](void* block) { free_blocks().give_back(static_cast<char*>(block), bytes); },
      at::TensorOptions().dtype(type));
}

}  // namespace fastrnn
