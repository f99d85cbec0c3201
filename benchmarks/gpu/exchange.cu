// Measures each way in which the blocks of a group can exchange a tile of the states, once per
// step, and small products with the weights in registers. Prints one JSON object per line, with
// times in nanoseconds per step:
//
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -I csrc -o exchange exchange.cu
//
// Every block adds 1 to the words that it received and passes them on. At the end each word of the
// tile must be the number of steps; "right" says whether it was.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <vector>

#include "cuda/platform.cuh"

using namespace fastrnn::platform;

constexpr int kThreads = 256;
constexpr int kFew = 1000, kMany = 3000;  // steps; the difference excludes the launch

// ---- The ways to exchange -----------------------------------------------------------------------

// Each block stores pieces of 16 bytes into the shared memory of every block of the cluster; each
// store arrives at the receiver's barrier. Two buffers suffice: a block stores into one again only
// after it received the tile in the other, and each warp sent its part of that after reading the
// first.
__global__ void __launch_bounds__(kThreads, 1)
    cluster_store_async(int bytes, int steps, uint32_t* out) {
  FASTRNN_SHARED(unsigned char, memory);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(memory);
  unsigned char* tile = memory + 128;
  const unsigned blocks = cluster_blocks(), rank = cluster_rank();
  const int slice = bytes / blocks, pieces = slice / 16 * blocks;
  for (int i = threadIdx.x; i < 2 * bytes / 4; i += kThreads)
    reinterpret_cast<uint32_t*>(tile)[i] = 0;
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      barrier_init(barrier + b, 1);
      barrier_expect(barrier + b, bytes);
    }
    barrier_fence_init();
  }
  cluster_sync();
  for (int step = 0; step < steps; ++step) {
    const int now = step & 1;
    unsigned char* to = tile + now * bytes + rank * slice;
    const unsigned char* from = tile + (1 - now) * bytes + rank * slice;
    for (int base = threadIdx.x / 32 * 32; base < pieces; base += kThreads) {
      const int i = base + threadIdx.x % 32, piece = i / blocks * 16, peer = i % blocks;
      uint4 value = {};
      if (i < pieces) value = *reinterpret_cast<const uint4*>(from + piece);
      value = {value.x + 1, value.y + 1, value.z + 1, value.w + 1};
      __syncwarp();  // a piece belongs to one warp: no other reads it or stores to it here
      if (i < pieces)
        st_async16(peer_address(to + piece, peer), value, peer_address(barrier + now, peer));
    }
    barrier_wait(barrier + now, step >> 1 & 1);
    if (threadIdx.x == 0) barrier_expect(barrier + now, bytes);  // for two steps later
  }
  cluster_sync();
  const uint32_t* last = reinterpret_cast<uint32_t*>(tile + (steps - 1 & 1) * bytes);
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < bytes / 4; i += kThreads) out[i] = last[i];
}

__global__ void __launch_bounds__(kThreads, 1) cluster_barrier(int, int steps, uint32_t* out) {
  for (int step = 0; step < steps; ++step) cluster_sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = steps;
}

// The exchange through global memory, that is the L2 cache: each block writes its slice, then its
// flag. One warp of each block waits for all flags before the block reads the tile.
__global__ void __launch_bounds__(kThreads, 1)
    flags(int bytes, int steps, uint32_t* out, unsigned char* area, uint32_t* flag, int blocks) {
  FASTRNN_SHARED(unsigned char, tile);
  const int group = blockIdx.x / blocks, rank = blockIdx.x % blocks, slice = bytes / blocks;
  area += static_cast<size_t>(group) * 2 * bytes;
  flag += static_cast<size_t>(group) * blocks * 32;
  for (int i = threadIdx.x; i < bytes / 4; i += kThreads) reinterpret_cast<uint32_t*>(tile)[i] = 0;
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    unsigned char* to = area + (step & 1) * bytes;
    for (int at = rank * slice + threadIdx.x * 16; at < (rank + 1) * slice; at += kThreads * 16) {
      uint4 value = *reinterpret_cast<const uint4*>(tile + at);
      value = {value.x + 1, value.y + 1, value.z + 1, value.w + 1};
      *reinterpret_cast<uint4*>(to + at) = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag + rank * 32, step + 1);
    if (threadIdx.x < 32)
      for (int i = threadIdx.x; i < blocks; i += 32)
        while (load_acquire(flag + i * 32) < static_cast<uint32_t>(step + 1)) {
        }
    __syncthreads();
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16)
      copy_async16(tile + at, to + at, true);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < bytes / 4; i += kThreads)
      out[i] = reinterpret_cast<uint32_t*>(tile)[i];
}

// The same without flags: 4 of 16 bytes are the step, and a reader loads until they are the right
// one. It relies on the hardware to store and load 16 bytes at once, which no document promises.
__global__ void __launch_bounds__(kThreads, 1)
    poll_on_data(int bytes, int steps, uint32_t* out, uint4* area, uint32_t*, int blocks) {
  FASTRNN_SHARED(uint32_t, tile);
  const int group = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  const int pieces = bytes / 16, slice = pieces / blocks;  // the tile has 12 bytes of each piece
  area += static_cast<size_t>(group) * 2 * pieces;
  for (int i = threadIdx.x; i < pieces * 3; i += kThreads) tile[i] = 0;
  __syncthreads();
  for (uint32_t step = 1; step <= static_cast<uint32_t>(steps); ++step) {
    uint4* to = area + (step & 1) * pieces;
    for (int i = rank * slice + threadIdx.x; i < (rank + 1) * slice; i += kThreads)
      asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + i),
                   "r"(tile[3 * i] + 1), "r"(tile[3 * i + 1] + 1), "r"(tile[3 * i + 2] + 1),
                   "r"(step)
                   : "memory");
    __syncthreads();
    for (int i = threadIdx.x; i < pieces; i += kThreads) {
      uint4 value;
      do {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "l"(to + i)
                     : "memory");
      } while (value.w != step);
      tile[3 * i] = value.x, tile[3 * i + 1] = value.y, tile[3 * i + 2] = value.z;
    }
    __syncthreads();
  }
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < pieces * 3; i += kThreads) out[i] = tile[i];
}

__global__ void __launch_bounds__(kThreads, 1) grid_barrier(int, int steps, uint32_t* out) {
  for (int step = 0; step < steps; ++step) cooperative_groups::this_grid().sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = steps;
}

// ---- Products -----------------------------------------------------------------------------------

// A step of one warp: 32 rows of weights in registers, times NT tiles of 8 columns, K = 256.
template <int NT>
__global__ void __launch_bounds__(512, 1) product(int, int steps, uint32_t* out) {
  constexpr int kChunks = 16, kRow = 256 + 8;
  FASTRNN_SHARED(bfloat16, tile);
  for (int i = threadIdx.x; i < 8 * NT * kRow; i += blockDim.x) store(tile + i, 1.0f / 256);
  __syncthreads();
  uint32_t a[2][kChunks][4];
  for (int m = 0; m < 2; ++m)
    for (int k = 0; k < kChunks; ++k)
      for (int r = 0; r < 4; ++r) a[m][k][r] = out[threadIdx.x & 1];
  float sum[2][NT][4] = {};
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int k = 0; k < kChunks; k += 2)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint32_t b[4];
        ldmatrix4(b, tile + (8 * n + lane % 8) * kRow + k * 16 + lane / 8 * 8);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          mma(sum[m][n], a[m][k], low, bfloat16{});
          mma(sum[m][n], a[m][k + 1], high, bfloat16{});
        }
      }
  }
  float all = 0;
  for (int m = 0; m < 2; ++m)
    for (int n = 0; n < NT; ++n)
      for (int r = 0; r < 4; ++r) all += sum[m][n][r];
  if (all == 12345.0f) out[0] = 1;  // keeps the compiler from removing the sums
}

// ---- Measuring ----------------------------------------------------------------------------------

struct Memory {
  uint32_t* out;
  unsigned char* area;
  uint32_t* flag;
};
constexpr size_t kArea = 64 << 20, kFlags = 1 << 20, kOut = 1 << 20;

// Nanoseconds per step of the best of several launches, or the error of CUDA, negated.
template <class Launch>
double per_step(const Memory& memory, Launch launch_steps) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  double best[2] = {1e30, 1e30};
  int error = 0;
  for (int round = 0; round < 5 && error == 0; ++round)
    for (int k = 0; k < 2 && error == 0; ++k) {
      cudaMemset(memory.area, 0, kArea), cudaMemset(memory.flag, 0, kFlags);
      cudaMemset(memory.out, 0, kOut);
      cudaEventRecord(begin);
      error = launch_steps(k == 0 ? kFew : kMany);
      cudaEventRecord(end);
      const int later = cudaEventSynchronize(end);
      if (error == 0) error = later;
      float milliseconds = 0;
      cudaEventElapsedTime(&milliseconds, begin, end);
      if (milliseconds < best[k]) best[k] = milliseconds;
    }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  cudaGetLastError();
  return error ? -error : (best[1] - best[0]) * 1e6 / (kMany - kFew);
}

bool all_counted(const Memory& memory, int words) {
  std::vector<uint32_t> out(words);
  cudaMemcpy(out.data(), memory.out, words * sizeof(uint32_t), cudaMemcpyDeviceToHost);
  for (uint32_t word : out)
    if (word != kMany) return false;
  return true;
}

void print(const char* way, int blocks, int groups, int bytes, double nanoseconds, bool right) {
  if (nanoseconds < 0)
    std::printf(
        "{\"way\": \"%s\", \"blocks\": %d, \"groups\": %d, \"bytes\": %d, \"error\": \"%s\"}\n",
        way, blocks, groups, bytes,
        cudaGetErrorString(static_cast<cudaError_t>(-static_cast<int>(nanoseconds))));
  else
    std::printf(
        "{\"way\": \"%s\", \"blocks\": %d, \"groups\": %d, \"bytes\": %d, \"ns\": %.1f, "
        "\"right\": %s}\n",
        way, blocks, groups, bytes, nanoseconds, right ? "true" : "false");
}

void clusters(const Memory& memory, int groups) {
  for (unsigned blocks : {2u, 4u, 8u, 16u}) {
    const dim3 grid(groups * blocks);
    const double barrier = per_step(memory, [&](int steps) {
      return launch(cluster_barrier, grid, dim3(kThreads), 0, blocks, false, nullptr, 0, steps,
                    memory.out);
    });
    print("cluster barrier", blocks, groups, 0, barrier, all_counted(memory, 1));
    for (int bytes : {512, 4 << 10, 8 << 10, 16 << 10, 32 << 10}) {
      const double time = per_step(memory, [&](int steps) {
        return launch(cluster_store_async, grid, dim3(kThreads), 128 + 2 * bytes, blocks, false,
                      nullptr, bytes, steps, memory.out);
      });
      print("st.async and mbarrier", blocks, groups, bytes, time, all_counted(memory, bytes / 4));
    }
  }
}

void through_the_cache(const Memory& memory, int multiprocessors) {
  for (int blocks : {8, 32, 64, 128}) {
    if (blocks > multiprocessors) continue;
    const int groups = multiprocessors / blocks;
    for (int bytes : {2 << 10, 8 << 10, 32 << 10}) {
      if (bytes / blocks < 16) continue;
      const double flagged = per_step(memory, [&](int steps) {
        return launch(flags, dim3(groups * blocks), dim3(kThreads), bytes, 1, true, nullptr, bytes,
                      steps, memory.out, memory.area, memory.flag, blocks);
      });
      print("flags in L2", blocks, groups, bytes, flagged, all_counted(memory, bytes / 4));
      const double polled = per_step(memory, [&](int steps) {
        return launch(poll_on_data, dim3(groups * blocks), dim3(kThreads), bytes, 1, true, nullptr,
                      bytes, steps, memory.out, reinterpret_cast<uint4*>(memory.area), memory.flag,
                      blocks);
      });
      print("polled data in L2", blocks, groups, bytes, polled,
            all_counted(memory, bytes / 16 * 3));
    }
  }
  for (int blocks : {32, multiprocessors}) {
    const double time = per_step(memory, [&](int steps) {
      return launch(grid_barrier, dim3(blocks), dim3(kThreads), 0, 1, true, nullptr, 0, steps,
                    memory.out);
    });
    print("grid.sync", blocks, 1, 0, time, all_counted(memory, 1));
  }
}

template <int NT>
void products(const Memory& memory) {
  for (int warps : {4, 8, 16}) {
    const double time = per_step(memory, [&](int steps) {
      return launch(product<NT>, dim3(1), dim3(32 * warps), 8 * NT * (256 + 8) * 2, 1, false,
                    nullptr, 0, steps, memory.out);
    });
    std::printf(
        "{\"way\": \"product\", \"warps\": %d, \"rows\": %d, \"columns\": %d, \"ns\": %.1f}\n",
        warps, 32 * warps, 8 * NT, time);
  }
}

void count_resident_clusters() {
  for (int shared : {1 << 10, 100 << 10, 200 << 10})
    for (int blocks : {2, 4, 8, 16})
      std::printf(
          "{\"way\": \"resident clusters\", \"blocks\": %d, \"shared\": %d, \"count\": %d}\n",
          blocks, shared, resident_clusters(cluster_store_async, blocks, kThreads, shared));
}

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a reader gets each line at once
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::fprintf(stderr, "there is no GPU\n");
    return 2;
  }
  Memory memory;
  cudaMalloc(&memory.out, kOut), cudaMalloc(&memory.area, kArea), cudaMalloc(&memory.flag, kFlags);
  if (device.major >= 9) {
    count_resident_clusters();
    clusters(memory, 1);
    clusters(memory, 4);
  }
  through_the_cache(memory, device.multiProcessorCount);
  products<1>(memory);
  products<2>(memory);
  products<4>(memory);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
