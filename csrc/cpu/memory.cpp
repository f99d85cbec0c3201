#include "cpu/memory.h"

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn {

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & -kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

char* allocate(size_t bytes) {
  const size_t unit = bytes < kHugePage ? 128 : kHugePage;
  bytes = (bytes + unit - 1) / unit * unit;
  char* block = static_cast<char*>(std::aligned_alloc(unit, bytes));
  if (block) prefer_huge_pages(block, bytes);
  return block;
}

CachedMemory::~CachedMemory() { std::free(block_); }

char* CachedMemory::borrow(size_t bytes) {
  if (lent_ || bytes > kMost) return allocate(bytes);
  if (bytes > size_) {
    std::free(block_);
    block_ = allocate(bytes);
    size_ = block_ ? bytes : 0;
  }
  lent_ = block_ != nullptr;
  return block_;
}

void CachedMemory::give_back(char* block) {
  if (block && block == block_)
    lent_ = false;
  else
    std::free(block);
}

CachedMemory& sweep_memory() {
  thread_local CachedMemory memory;
  return memory;
}

}  // namespace fastrnn
