// Allocates working memory. The first touch of a page costs about a microsecond, several times as
// much as the kernel's work on it: so large blocks ask for huge pages, and a thread keeps its
// working memory from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages for the part of the memory that whole ones fit into; it must be untouched.
// Does nothing on systems without them.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & -kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Memory for std::free to free; null when memory runs out. A huge page is contiguous in physical
// memory, so all of a block as large as a cache finds a place there.
inline char* allocate(size_t bytes) {
  const size_t unit = bytes < kHugePage ? 128 : kHugePage;
  bytes = (bytes + unit - 1) / unit * unit;
  char* block = static_cast<char*>(std::aligned_alloc(unit, bytes));
  if (block) prefer_huge_pages(block, bytes);
  return block;
}

// Working memory that a thread keeps from call to call, up to kMost bytes. It has one user at a
// time; others get memory of their own.
class CachedMemory {
 public:
  CachedMemory() = default;
  ~CachedMemory() { std::free(block_); }
  CachedMemory(const CachedMemory&) = delete;
  CachedMemory& operator=(const CachedMemory&) = delete;

  // Null when memory runs out.
  char* borrow(size_t bytes) {
    if (lent_ || bytes > kMost) return allocate(bytes);
    if (bytes > size_) {
      std::free(block_);
      block_ = allocate(bytes);
      size_ = block_ ? bytes : 0;
    }
    lent_ = block_ != nullptr;
    return block_;
  }
  void give_back(char* block) {
    if (block && block == block_)
      lent_ = false;
    else
      std::free(block);
  }

 private:
  static constexpr size_t kMost = size_t{64} << 20;

  char* block_ = nullptr;
  size_t size_ = 0;
  bool lent_ = false;
};

}  // namespace fastrnn
