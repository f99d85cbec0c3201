// Failures: how a kernel that does something wrong ends, and the text that explains it, with the
// block and the thread that found it and with all threads that wait if none can go on.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "machine.h"

namespace fastrnn {
namespace sim {
namespace {

std::string failure;  // the text of the last one

}  // namespace

std::string place_of(const Block* block) {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", block->index.x, block->index.y,
                block->index.z);
  return text;
}

void deadlock() {
  std::string text = "deadlock: no thread can go on";
  int lines = 0;
  const Fiber* end = machine.fibers.data() + machine.fibers.size();
  for (const Fiber* fiber = machine.fibers.data(); fiber < end;) {
    const Fiber* last = fiber;
    while (last + 1 < end && last[1].block == fiber->block && last[1].done == fiber->done &&
           last[1].waits == fiber->waits && last[1].waits_at == fiber->waits_at) {
      ++last;
    }
    if (!fiber->done && ++lines <= 24) {
      char line[256];
      std::snprintf(line, sizeof line, "\n  %s threads %u-%u: %s", place_of(fiber->block).c_str(),
                    linear(*fiber), linear(*last), fiber->waits ? fiber->waits : "running");
      text += line;
      if (fiber->waits_at) {
        const auto* at = static_cast<const unsigned char*>(fiber->waits_at);
        const size_t offset = static_cast<size_t>(at - fiber->block->shared);
        if (offset < shape.shared_bytes) {
          std::snprintf(line, sizeof line, " at byte %zu of shared memory", offset);
        } else {
          std::snprintf(line, sizeof line, " at %p", fiber->waits_at);
        }
        text += line;
      }
    }
    fiber = last + 1;
  }
  fail("%s", text.c_str());
}

void fail(const char* format, ...) {
  const Quiet quiet;
  char text[8192];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failure = text;
  if (const Fiber* fiber = current()) {
    failure += "\n  (found by " + place_of(fiber->block) + " thread " +
               std::to_string(linear(*fiber)) + ", seed " + std::to_string(seed_given) + ")";
  }
  std::fprintf(stderr, "cudasim: %s\n", failure.c_str());
  machine.failed = true;
  if (!self) std::abort();
  switch_to(nullptr);  // never returns
  std::abort();
}

const char* error_text(int error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorLaunchFailure:
      return failure.c_str();
    default:
      return "an error that the simulator does not know";
  }
}

}  // namespace sim
}  // namespace fastrnn
