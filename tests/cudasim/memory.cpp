// Memory: whether addresses are legal, asynchronous copies from global to shared memory (cp.async),
// and the functions of the host that clear and copy memory.
#include "machine.h"

namespace fastrnn {
namespace sim {

void check_aligned(const char* what, const void* p, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail("%s: address %p is not aligned to %zu bytes", what, p, alignment);
  }
}

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  check_aligned(what, p, alignment);
  const auto* at = static_cast<const unsigned char*>(p);
  const size_t offset = static_cast<size_t>(at - self->block->shared);
  if (at < self->block->shared || offset + bytes > shape.shared_bytes) {
    fail("%s: address %p is not in the block's %zu bytes of shared memory", what, p,
         shape.shared_bytes);
  }
}

bool copy_begins(void* shared, const void* global, bool valid) {
  if (machine.early_one_in && machine.random.below(machine.early_one_in) == 0) return true;
  const Quiet quiet;
  current()->copies.push_back({shared, valid ? global : nullptr});
  return false;
}

void copy_async_commit() {
  const Quiet quiet;
  Fiber* fiber = current();
  fiber->group_end.push_back(fiber->landed + fiber->copies.size());
}

bool next_copy(int groups_left, Copy* copy) {
  const Quiet quiet;
  Fiber* fiber = current();
  const size_t groups = fiber->group_end.size(), left = static_cast<size_t>(groups_left);
  if (groups <= left) return false;
  if (fiber->landed == fiber->group_end[groups - left - 1]) {
    fiber->group_end.erase(fiber->group_end.begin(),
                           fiber->group_end.begin() + static_cast<ptrdiff_t>(groups - left));
    return false;
  }
  *copy = fiber->copies.front();
  fiber->copies.erase(fiber->copies.begin());
  ++fiber->landed;
  return true;
}

int clear(void* p, size_t bytes) {
  std::memset(p, 0, bytes);
  return cudaSuccess;
}

int copy(void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

}  // namespace sim
}  // namespace fastrnn
