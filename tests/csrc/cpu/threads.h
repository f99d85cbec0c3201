// Threads in place of libgomp, which ThreadSanitizer does not understand and cross compilers may
// lack.
#pragma once

#include <thread>
#include <vector>

namespace {
thread_local int number = 0, members = 1;
}  // namespace
extern "C" {
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return members; }
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  const auto run = [=](int index) {
    number = index;
    members = static_cast<int>(threads);
    body(data);
    number = 0;
    members = 1;
  };
  for (unsigned index = 1; index < threads; ++index) others.emplace_back(run, index);
  run(0);
  for (std::thread& other : others) other.join();
}
}
