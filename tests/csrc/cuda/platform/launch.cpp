// The host's part of csrc/cuda/platform/launch.cuh with a runtime of CUDA that only takes notes:
// what a kernel is told, and with which attributes it is launched.
#include "cuda/platform/launch.cuh"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

int current_device = 0, compiled_for = 90, driver_error = 0, pending = 0;
std::atomic<int> set{0}, asked{0};
std::string launched;  // the attributes of the last launch
cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;

int fails(int error) {
  if (error != 0) pending = error;
  return error;
}

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  ++asked;
  attributes->ptxVersion = compiled_for;
  attributes->sharedSizeBytes = 1024;
  return static_cast<cudaError_t>(fails(driver_error));
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    ++set;
    if (value != (227 << 10) - 1024) std::abort();
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const int last = pending;
  pending = 0;
  return static_cast<cudaError_t>(last);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  launched = "launched";
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    switch (config->attrs[i].id) {
      case cudaLaunchAttributeClusterDimension:
        launched += " cluster";
        break;
      case cudaLaunchAttributeCooperative:
        launched += " cooperative";
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        launched += " overlaps";
        break;
      default:
        launched += " unknown";
    }
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 7;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream ? capture : cudaStreamCaptureStatusNone;
  return static_cast<cudaError_t>(stream ? 0 : fails(capture ? 906 : 0));
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "some error"; }
}

using fastrnn::platform::facts_of;
using fastrnn::platform::Launch;

void kernel(int) {}
void other(int) {}

const void* pointer(void (*function)(int)) { return reinterpret_cast<const void*>(function); }

void run(unsigned cluster, bool overlaps) {
  Launch how;
  how.cluster = cluster;
  how.overlaps = overlaps;
  launched = "refused";
  const int error = fastrnn::platform::launch(kernel, how, nullptr, 1);
  std::printf("%s %d\n", launched.c_str(), error);
}

// Arguments: what the code was compiled for, and the error of the driver.
int main(int, char** arguments) {
  compiled_for = std::atoi(arguments[1]);
  driver_error = std::atoi(arguments[2]);
  run(1, false);
  run(1, true);
  run(8, false);
  std::printf("clusters %d\n", fastrnn::platform::resident_clusters(kernel, 8, 256, 1 << 16));
  const auto facts = facts_of(pointer(kernel));
  std::printf("facts %d %d, left over %d\n", facts.error, facts.architecture, pending);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back([] { facts_of(pointer(other)); });
  for (std::thread& thread : threads) thread.join();
  current_device = 1;
  run(1, false);
  run(1, false);
  std::printf("set %d, asked %d\n", set.load(), asked.load());
  // On a stream, and on the default stream during a capture elsewhere.
  for (const auto status : {cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive}) {
    capture = status;
    const bool own = fastrnn::platform::capturing(&capture);
    const bool other = fastrnn::platform::capturing(nullptr);
    std::printf("capturing %d %d, left over %d\n", own, other, pending);
  }
}
