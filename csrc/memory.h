// Where working memory comes from. The first touch of a page costs about a microsecond, several
// times what the kernel then does to it: large blocks ask for huge pages, and a thread keeps its
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

// Asks for huge pages where they fit whole into memory that was not touched yet. Where the system
// has none, nothing happens.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & -kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace fastrnn
