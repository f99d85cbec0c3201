// Working memory. The first touch of a page costs about a microsecond, several times as much as the
// kernel's work on it: so large blocks ask for huge pages, and a thread keeps its working memory
// from call to call.
#pragma once

#include <cstddef>

#include "cpu/exported.h"

namespace fastrnn {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages for the part of the memory that whole ones fit into; it must be untouched.
// Does nothing on systems without them.
FASTRNN_EXPORTED void prefer_huge_pages(void* memory, size_t bytes);

// Memory for std::free to free; null when memory runs out. A huge page is contiguous in physical
// memory, so all of a block as large as a cache finds a place there.
FASTRNN_EXPORTED char* allocate(size_t bytes);

// Working memory that a thread keeps from call to call, up to kMost bytes. It has one user at a
// time; others get memory of their own.
class FASTRNN_EXPORTED CachedMemory {
 public:
  CachedMemory() = default;
  ~CachedMemory();
  CachedMemory(const CachedMemory&) = delete;
  CachedMemory& operator=(const CachedMemory&) = delete;

  // Null when memory runs out.
  char* borrow(size_t bytes);
  void give_back(char* block);

 private:
  static constexpr size_t kMost = size_t{64} << 20;

  char* block_ = nullptr;
  size_t size_ = 0;
  bool lent_ = false;
};

// The working memory of the calling thread for sweeps, one for all libraries. The sweeps of a call
// follow each other, so each finds in the cache what the one before it used, even if a custom
// cell's library has one of them.
FASTRNN_EXPORTED CachedMemory& sweep_memory();

}  // namespace fastrnn
