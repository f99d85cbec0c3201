// Small kernels that test the simulator itself, each with faults that it must find. They are not
// installed.
#include "cuda/platform.cuh"

namespace fastrnn {
namespace {

using namespace platform;

enum Fault {
  kNone = 0,
  kNoBarrier,         // no barrier between two steps
  kSingleBuffer,      // written while others read it
  kNoWait,            // for an mbarrier, for a copy
  kWrongParity,       // waits for the previous phase
  kShortExpect,       // one piece too few
  kLongExpect,        // one piece too many
  kNoClusterSync,     // peers have no barriers yet
  kNoLastWait,        // a block ends while peers still store into it
  kTargetTooSmall,    // the value that a flag must reach
  kNotCooperative,    // blocks wait for blocks that may not run
  kNoBarrierPublish,  // a flag that is set before all threads have stored
  kNoCommit,          // copies for which no wait waits
  kOutsideShared,     // one element past the end
  kOutsideGlobal,     // one element past the end
  kDiverged,          // a lane takes no part in a product
  kMisaligned,
  kWrongThreads,   // a named barrier for more threads than arrive
  kTwiceArrived,   // at a cluster's barrier
  kBadPeer,        // a rank that the cluster lacks
  kNoWarpSync,     // lanes read values that another lane may not have written
  kUninitialised,  // shared memory that nobody wrote
};

// ---- One state of n numbers, stepped by the threads of a block, a cluster, a grid --------------

__device__ __forceinline__ uint32_t next_state(const uint32_t* now, unsigned i, unsigned n, int t) {
  return 3 * now[(i + 1) % n] + 5 * now[(i + n - 7) % n] + i + static_cast<unsigned>(t);
}

__global__ void block_scan(uint32_t* x, int steps, int fault) {
  FASTRNN_SHARED(uint32_t, buffer);  // [2][n]
  const unsigned n = blockDim.x, i = threadIdx.x;
  uint32_t* mine = x + blockIdx.x * n;
  if (fault != kUninitialised) buffer[i] = mine[i];
  __syncthreads();
  int from = 0;
  for (int t = 0; t < steps; ++t) {
    const int to = fault == kSingleBuffer ? from : 1 - from;
    buffer[to * n + i + (fault == kOutsideShared ? n : 0)] = next_state(buffer + from * n, i, n, t);
    from = to;
    if (fault != kNoBarrier) __syncthreads();
  }
  mine[i + (fault == kOutsideGlobal ? n : 0)] = buffer[from * n + i];
}

// Blocks exchange their states by stores that count bytes. Two buffers suffice: a block overwrites
// the states of step t only after it received all of step t + 1, and peers sent those after they
// had read step t.
__global__ void cluster_scan(uint32_t* x, int steps, int fault) {
  FASTRNN_SHARED(unsigned char, shared);
  auto* arrived = reinterpret_cast<uint64_t*>(shared);      // [2], one for each buffer
  auto* buffer = reinterpret_cast<uint32_t*>(shared + 16);  // [2][n]
  const unsigned blocks = cluster_blocks(), n = blocks * blockDim.x;
  const unsigned i = cluster_rank() * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  for (unsigned j = threadIdx.x; j < n; j += blockDim.x) buffer[j] = x[j];
  if (threadIdx.x == 0) {
    barrier_init(&arrived[0], 1);
    barrier_init(&arrived[1], 1);
    barrier_fence_init();
  }
  if (fault != kNoClusterSync) cluster_sync();
  __syncthreads();
  for (int t = 0; t <= steps; ++t) {
    const unsigned parity = (t - 1) / 2 % 2;
    if (t > 0 && fault != kNoWait && !(fault == kNoLastWait && t == steps)) {
      barrier_wait(&arrived[t % 2], fault == kWrongParity ? 1 - parity : parity);
    }
    const uint32_t* now = buffer + (fault == kSingleBuffer ? 0 : t % 2 * n);
    if (t == steps) {
      x[i] = now[i];
      break;
    }
    if (threadIdx.x == 0) {
      const int extra = fault == kShortExpect ? -16 : fault == kLongExpect ? 16 : 0;
      barrier_expect(&arrived[(t + 1) % 2], 4 * n + extra);
    }
    const uint32_t value = next_state(now, i, n, t);
    uint4 piece;
    piece.x = value;
    piece.y = __shfl_down_sync(~0u, value, 1);
    piece.z = __shfl_down_sync(~0u, value, 2);
    piece.w = __shfl_down_sync(~0u, value, 3);
    // A shuffle orders no memory accesses. After this, all lanes have read the buffer.
    if (fault != kNoWarpSync) __syncwarp();
    if (lane % 4 == 0) {
      const uint32_t* place = buffer + (fault == kSingleBuffer ? 0 : (t + 1) % 2 * n) + i;
      for (unsigned rank = 0; rank < blocks; ++rank) {
        const unsigned to = fault == kBadPeer ? rank + 1 : rank;
        st_async16(peer_address(place, to), piece, peer_address(&arrived[(t + 1) % 2], to));
      }
    }
  }
  if (fault == kTwiceArrived) {
    cluster_arrive();
    cluster_arrive();
  }
}

__global__ void grid_scan(uint32_t* x, uint32_t* exchange, uint32_t* flags, int steps, int fault) {
  FASTRNN_SHARED(uint32_t, tile);  // [n]
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  constexpr unsigned kFlagApart = 32;
  uint32_t value = x[i];
  for (int t = 0; t < steps; ++t) {
    uint32_t* published = exchange + (fault == kSingleBuffer ? 0 : t % 2 * n);
    published[i] = value;
    if (fault != kNoBarrierPublish) __syncthreads();
    if (threadIdx.x == 0) store_release(flags + blockIdx.x * kFlagApart, t + 1);
    const auto target = static_cast<uint32_t>(fault == kTargetTooSmall ? t : t + 1);
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      while (load_acquire(flags + b * kFlagApart) < target) {
      }
    }
    __syncthreads();
    for (unsigned j = threadIdx.x; j < n / 4; j += blockDim.x) {
      const unsigned shift = fault == kMisaligned ? 1 : 0;
      copy_async16(tile + 4 * j, published + 4 * j + shift, true);
    }
    if (fault != kNoCommit) copy_async_commit();
    if (fault != kNoWait) copy_async_wait<0>();
    __syncthreads();
    value = next_state(tile, i, n, t);
  }
  x[i] = value;
}

// ---- Warps -------------------------------------------------------------------------------------

// c[16][8] += a[16][16] b[8][16]^T, operands by ldmatrix4 as a GPU lays them out.
template <class T>
__global__ void product16(const T* a, const T* b, float* c, int fault) {
  FASTRNN_SHARED(T, shared);
  const unsigned lane = threadIdx.x, g = lane / 4, q = lane % 4;
  for (unsigned j = lane; j < 256; j += 32) shared[j] = a[j];
  for (unsigned j = lane; j < 128; j += 32) shared[256 + j] = b[j];
  __syncthreads();
  uint32_t x[4], y[4];
  ldmatrix4(x, shared + lane % 16 * 16 + lane / 16 * 8);
  // The second half of the lanes names the same rows again; y[2] and y[3] are not used.
  ldmatrix4(y, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  const uint32_t operand[2] = {y[0], y[1]};
  float d[4] = {c[g * 8 + 2 * q], c[g * 8 + 2 * q + 1], c[(g + 8) * 8 + 2 * q],
                c[(g + 8) * 8 + 2 * q + 1]};
  if (fault != kDiverged || lane != 5) mma(d, x, operand, T{});
  c[g * 8 + 2 * q] = d[0];
  c[g * 8 + 2 * q + 1] = d[1];
  c[(g + 8) * 8 + 2 * q] = d[2];
  c[(g + 8) * 8 + 2 * q + 1] = d[3];
}

// c[16][8] += a[16][8] b[8][8]^T; ldmatrix4 loads TF32 operands too, 4 numbers per row.
__global__ void product8(const float* a, const float* b, float* c) {
  FASTRNN_SHARED(uint32_t, shared);
  const unsigned lane = threadIdx.x, g = lane / 4, q = lane % 4;
  for (unsigned j = lane; j < 128; j += 32) shared[j] = to_tf32(a[j]);
  for (unsigned j = lane; j < 64; j += 32) shared[128 + j] = to_tf32(b[j]);
  __syncthreads();
  uint32_t x[4], y[4];
  ldmatrix4(x, shared + lane % 16 * 8 + lane / 16 * 4);
  ldmatrix4(y, shared + 128 + lane % 8 * 8 + lane / 8 % 2 * 4);
  const uint32_t operand[2] = {y[0], y[1]};
  float d[4] = {c[g * 8 + 2 * q], c[g * 8 + 2 * q + 1], c[(g + 8) * 8 + 2 * q],
                c[(g + 8) * 8 + 2 * q + 1]};
  mma_tf32(d, x, operand);
  c[g * 8 + 2 * q] = d[0];
  c[g * 8 + 2 * q + 1] = d[1];
  c[(g + 8) * 8 + 2 * q] = d[2];
  c[(g + 8) * 8 + 2 * q + 1] = d[3];
}

// out: [2][32][4], the words of each lane for four matrices, plain and transposed.
__global__ void matrices(const uint32_t* in, uint32_t* out, int fault) {
  FASTRNN_SHARED(uint32_t, shared);
  const unsigned lane = threadIdx.x;
  for (int j = 0; j < 4; ++j) shared[4 * lane + j] = in[4 * lane + j];
  if (fault != kNoWarpSync) __syncwarp();
  uint32_t r[4];
  ldmatrix4(r, shared + 4 * (31 - lane) + (fault == kMisaligned ? 1 : 0));
  for (int j = 0; j < 4; ++j) out[4 * lane + j] = r[j];
  ldmatrix4_transposed(r, shared + 4 * (31 - lane));
  for (int j = 0; j < 4; ++j) out[128 + 4 * lane + j] = r[j];
}

// out: [7][64], two warps, the second of which lacks its upper half.
__global__ void shuffles(uint32_t* out) {
  const unsigned i = threadIdx.x, lane = i % 32, n = 48;
  const uint32_t value = 100 * i;
  out[i] = __shfl_sync(~0u, value, static_cast<int>(lane * 7 % 16));
  out[n + i] = __shfl_xor_sync(~0u, value, 5);
  out[2 * n + i] = __shfl_down_sync(~0u, value, 3, 16);
  out[3 * n + i] = __shfl_up_sync(~0u, value, 3, 16);
  out[4 * n + i] = __ballot_sync(~0u, lane % 3 == 0);
  // The two halves of a warp diverge.
  if (lane < 16) {
    out[5 * n + i] = __shfl_xor_sync(0xffffu, value, 1);
  } else {
    out[5 * n + i] = __shfl_xor_sync(0xffff0000u, value, 2);
  }
  const auto wide = static_cast<uint64_t>(value) << 32 | i;
  out[6 * n + i] = static_cast<uint32_t>(__shfl_sync(~0u, wide, 2) >> 32);
}

// ---- Copies and named barriers -----------------------------------------------------------------

// Three groups of copies, awaited one by one; in the last, every other copy is not valid.
__global__ void copies(const uint32_t* in, uint32_t* out) {
  FASTRNN_SHARED(uint32_t, shared);
  const unsigned i = threadIdx.x, n = blockDim.x;
  for (unsigned group = 0; group < 3; ++group) {
    const unsigned at = 4 * (group * n + i);
    copy_async16(shared + at, in + at, group < 2 || i % 2 == 0);
    copy_async_commit();
  }
  for (unsigned j = 0; j < 4; ++j) out[4 * i + j] = shared[4 * (2 * n + i) + j];  // before any wait
  copy_async_wait<2>();
  for (unsigned j = 0; j < 4; ++j) out[4 * (n + i) + j] = shared[4 * i + j];
  copy_async_wait<0>();
  for (unsigned j = 0; j < 8; ++j) out[4 * (2 * n + 2 * i) + j] = shared[4 * (n + 2 * i) + j];
}

// The first half of the warps writes, the second reads, in turns.
__global__ void turns(uint32_t* out, int steps, int fault) {
  FASTRNN_SHARED(uint32_t, shared);
  const unsigned half = blockDim.x / 2, i = threadIdx.x % half;
  constexpr unsigned kFull = 1, kEmpty = 2;
  uint32_t sum = 0;
  const unsigned count = fault == kWrongThreads ? blockDim.x + 32 : blockDim.x;
  for (int t = 0; t < steps; ++t) {
    if (threadIdx.x < half) {
      shared[i] = i * steps + t;
      if (fault != kNoBarrier) named_barrier(kFull, count);
      if (fault != kSingleBuffer) named_barrier(kEmpty, blockDim.x);
    } else {
      if (fault != kNoBarrier) named_barrier(kFull, count);
      sum = 31 * sum + shared[half - 1 - i];
      if (fault != kSingleBuffer) named_barrier(kEmpty, blockDim.x);
    }
  }
  if (threadIdx.x >= half) out[i] = sum;
}

// Half the threads leave before the others meet.
__global__ void leavers(uint32_t* out) {
  FASTRNN_SHARED(uint32_t, shared);
  const unsigned i = threadIdx.x, half = blockDim.x / 2;
  shared[i] = i;
  __syncthreads();
  if (i >= half) return;
  shared[i] += shared[half + i];
  __syncthreads();
  out[i] = shared[half - 1 - i];
}

__global__ void numbers(const float* in, uint16_t* halves, float* back) {
  const unsigned i = threadIdx.x + blockIdx.x * blockDim.x;
  auto* b = reinterpret_cast<bfloat16*>(halves) + i;
  auto* h = reinterpret_cast<float16*>(halves) + gridDim.x * blockDim.x + i;
  store(b, in[i]);
  store(h, in[i]);
  back[2 * i] = to_float(*b);
  back[2 * i + 1] = to_float(*h);
}

__global__ void places(uint32_t* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  uint32_t* mine = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 3;
  mine[0] = block;
  mine[1] = thread;
  mine[2] = cluster_rank() * 100 + cluster_blocks();
}

}  // namespace
}  // namespace fastrnn

using namespace fastrnn;

extern "C" {

int run_block_scan(uint32_t* x, int blocks, int threads, int steps, int fault) {
  return platform::launch(block_scan, dim3(blocks), dim3(threads), 8 * threads, 1, false, nullptr,
                          x, steps, fault);
}

int run_cluster_scan(uint32_t* x, int blocks, int threads, int steps, int fault) {
  return platform::launch(cluster_scan, dim3(blocks), dim3(threads), 16 + 8 * blocks * threads,
                          blocks, false, nullptr, x, steps, fault);
}

int run_grid_scan(uint32_t* x, uint32_t* exchange, uint32_t* flags, int blocks, int threads,
                  int steps, int fault) {
  const int error = platform::clear(flags, 128 * blocks, nullptr);
  if (error) return error;
  return platform::launch(grid_scan, dim3(blocks), dim3(threads), 4 * blocks * threads, 1,
                          fault != kNotCooperative, nullptr, x, exchange, flags, steps, fault);
}

int run_product(int number, const void* a, const void* b, float* c, int fault) {
  const dim3 one(1), warp(32);
  if (number == 0) {
    return platform::launch(product16<platform::bfloat16>, one, warp, 768, 1, false, nullptr,
                            static_cast<const platform::bfloat16*>(a),
                            static_cast<const platform::bfloat16*>(b), c, fault);
  }
  if (number == 1) {
    return platform::launch(product16<platform::float16>, one, warp, 768, 1, false, nullptr,
                            static_cast<const platform::float16*>(a),
                            static_cast<const platform::float16*>(b), c, fault);
  }
  return platform::launch(product8, one, warp, 768, 1, false, nullptr, static_cast<const float*>(a),
                          static_cast<const float*>(b), c);
}

int run_matrices(const uint32_t* in, uint32_t* out, int fault) {
  return platform::launch(matrices, dim3(1), dim3(32), 512, 1, false, nullptr, in, out, fault);
}

int run_shuffles(uint32_t* out) {
  return platform::launch(shuffles, dim3(1), dim3(48), 0, 1, false, nullptr, out);
}

int run_copies(const uint32_t* in, uint32_t* out, int threads) {
  return platform::launch(copies, dim3(1), dim3(threads), 48 * threads, 1, false, nullptr, in, out);
}

int run_turns(uint32_t* out, int threads, int steps, int fault) {
  return platform::launch(turns, dim3(1), dim3(threads), 2 * threads, 1, false, nullptr, out, steps,
                          fault);
}

int run_leavers(uint32_t* out, int threads) {
  return platform::launch(leavers, dim3(1), dim3(threads), 4 * threads, 1, false, nullptr, out);
}

int run_numbers(const float* in, uint16_t* halves, float* back, int blocks) {
  return platform::launch(numbers, dim3(blocks), dim3(256), 0, 1, false, nullptr, in, halves, back);
}

int run_places(uint32_t* out, const int* grid, const int* block, int cluster, int shared_bytes) {
  return platform::launch(places, dim3(grid[0], grid[1], grid[2]),
                          dim3(block[0], block[1], block[2]), shared_bytes, cluster, false, nullptr,
                          out);
}

const char* run_error(int error) { return platform::error_text(error); }
}
