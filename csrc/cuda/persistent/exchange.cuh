// The exchange of a step's operand: from the warps that compute it to all blocks of their group,
// through shared memory, through that of a cluster, or through the L2 cache.
#pragma once

#include "cuda/persistent/product.cuh"

namespace fastrnn {
namespace tile {

constexpr int kMaxCluster = 16;  // blocks
constexpr int kFlag = 128;       // bytes from a flag to the next, a line of the L2 cache

// Bytes of workspace for a group of a grid: flags, which must be zero before the launch and lie
// side by side for all groups, and an area for B twice.
__host__ __device__ constexpr int64_t flag_bytes(const Layout& at) {
  return int64_t{at.active} * kFlag;
}
__host__ __device__ constexpr int64_t area_bytes(const Layout& at, int columns) {
  return int64_t{2} * columns * at.exchanged;
}

// A warp collects the pieces that it sends in eight rows of kPieces. At a time it writes eight
// adjacent numbers into rows 0, 2, 4 and 6, or 1, 3, 5 and 7, or reads eight pieces in the order of
// rows. Gaps before some rows, in all these bytes before row n, avoid bank conflicts of both.
template <int kPieces>
__host__ __device__ constexpr int staged_gaps(int n) {
  constexpr int kTogether = kPieces % 2 != 0 ? 8 : kPieces % 4 != 0 ? 4 : 2;
  return n / kTogether * 32;
}
template <int kPieces>
constexpr int staged_bytes() {
  return 8 * kPieces * kPiece + staged_gaps<kPieces>(7);
}

// Operand 0 lies in `first()` when the loop begins, `wait(i)` gives operand i, `send` takes pieces
// of operand i + 1, and every thread calls `sent` after the last of them. All threads of a block
// call `wait` and `sent` for the same operands.
//
// In a grid, operand i lies in global memory and is copied into shared memory, unless it is read in
// place; then there is no operand 0. The warps of a slice of the depth wait only for the blocks
// that compute it, copy it in two parts, and multiply the first while the second is on its way.
//
// Two buffers for B are enough. A warp writes operand i + 1 into a buffer, of its block or of a
// peer, after the slices of its row group, which have added up their sums, have received all of
// operand i. Each warp that read operand i - 1, from the same buffer, had a part in some piece of
// operand i, which was sent only after that warp had finished reading.
template <int kResidency, bool kInPlace>
struct Exchange {
  const Layout& at;
  int rank;            // of this block in its group
  int slice;           // of this warp
  int columns;         // of B: rows of the batch
  int operands;        // their number, operand 0 included
  char* tiles;         // B in shared memory
  uint64_t* barriers;  // of a cluster: one for each buffer, counting bytes
  int producer;        // of a grid: the first block that computes a part of the slice
  int owned;           // bytes of a row of B that a block computes
  int task;            // the number of the group
  char* areas;         // of a grid: each group's B twice, rows `exchanged` bytes apart
  char* flags;         // of a grid: the last operand that each block of each group has sent

  __device__ __forceinline__ char* first() const { return tiles; }

  // Call `begin` before operand 0 is written: it clears the buffers, padding included, and sets up
  // barriers. After `ready`, the block, or all of the cluster, has done so.
  __device__ __forceinline__ void begin() const {
    const int bytes = at.tile * (kResidency == kGrid ? 1 : 2);
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(tiles + i) = make_uint4(0, 0, 0, 0);
    if (kResidency == kCluster && threadIdx.x == 0) {
      platform::barrier_init(&barriers[0], 1);
      platform::barrier_init(&barriers[1], 1);
      platform::barrier_fence_init();
      if (operands > 1) platform::barrier_expect(&barriers[1], columns * at.exchanged);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void ready() const {
    if (kResidency == kCluster)
      platform::cluster_sync();
    else
      __syncthreads();
  }

  // Call before overwriting the states that every block read to build operand 0. A later operand,
  // or `ready` in a cluster or a lone block, proves that all read them; else the grid waits here.
  __device__ __forceinline__ void settle() const {
    if (kResidency != kGrid || operands > 1) return;
    sent(1);
    await(1);
  }

  // Call before a block returns: its peers may still write into its shared memory.
  __device__ __forceinline__ void end() const {
    if (kResidency == kCluster) platform::cluster_sync();
  }

  // A warp without units must not wait on the cluster barrier: nothing that it sends holds its
  // peers back, so they could run two phases ahead, which parity cannot tell from none.
  __device__ __forceinline__ const char* wait(int i, bool computes) const {
    if (kResidency == kGrid) {
      if (kInPlace) {
        if (i > 0) await(i);
        return area(i);
      }
      if (i > 0) receive(i);
      return tiles;
    }
    const int place = i & 1;
    if (kResidency == kBlock) {
      if (i > 0) __syncthreads();
    } else {
      if (i > 0 && computes) platform::barrier_wait(&barriers[place], (i - 1) >> 1 & 1);
      // Announces the next phase: no byte of it can arrive before this warp has sent its part.
      if (threadIdx.x == 0 && i + 2 < operands)
        platform::barrier_expect(&barriers[place], columns * at.exchanged);
    }
    return tiles + place * at.tile;
  }

  // What `wait` gives may still be on its way. Each warp calls this before it reads the k-blocks of
  // its slice whose weights stay in registers, and then with kRest before it reads the others.
  template <bool kRest>
  __device__ __forceinline__ void arrive() const {
    if (kResidency != kGrid || kInPlace) return;
    if (kRest && at.depth == at.resident) return;
    platform::copy_async_wait<kRest ? 0 : 1>();
    meet();
  }

  // The address at which a thread writes its part of operand i, for its warp to send: of the eight
  // columns from `column` on it has two, 2 (lane % 4) and the next, whose rows are `pitch` bytes
  // apart. A lone block writes into the operand itself, from `offset` on.
  struct Place {
    char* to;
    int pitch;
  };
  template <int kPieces>
  __device__ __forceinline__ Place place(int i, const char* staging, int column, int offset) const {
    const bool alone = kResidency == kBlock;
    const int pair = threadIdx.x % 4 * 2;
    // A choice of offsets, not of pointers, lets the compiler see that this is shared memory.
    const int own = static_cast<int>(staging - tiles);
    const int first = alone ? (i & 1) * at.tile + column * at.pitch + offset : own;
    const int pitch = alone ? at.pitch : kPieces * kPiece;
    const int gaps = alone ? 0 : staged_gaps<kPieces>(pair);
    return {tiles + first + pair * pitch + gaps, pitch};
  }

  // Sends kPieces pieces, which lie in `staging`, of each of eight columns from `column` on. Piece
  // q goes to `offset(q)` in the row of B; a piece past the row's end is not sent.
  template <int kPieces, class Offset>
  __device__ __forceinline__ void send(int i, const char* staging, int column,
                                       Offset offset) const {
    if (kResidency == kBlock) return;
    constexpr int kAll = 8 * kPieces;
    constexpr int kAtOnce = kAll % kWarp == 0 ? kWarp : kAll % 16 == 0 ? 16 : 8;  // lanes per peer
    const int lane = threadIdx.x % kWarp, place = i & 1;
    __syncwarp();
#pragma unroll
    for (int first = 0; first < kAll; first += kAtOnce) {
      const int piece = first + lane % kAtOnce;
      const int row = piece / kPieces, n = column + row, to = offset(piece % kPieces);
      if (to >= at.exchanged) continue;
      const char* from = staging + piece * kPiece + staged_gaps<kPieces>(row);
      const uint4 value = *reinterpret_cast<const uint4*>(from);
      if (kResidency == kCluster) {
        const char* here = tiles + place * at.tile + n * at.pitch + to;
#pragma unroll 4
        for (int some = 0; some < kMaxCluster; some += kWarp / kAtOnce) {
          const int peer = some + lane / kAtOnce;
          if (peer >= at.active) break;
          platform::st_async16(platform::peer_address(here, peer), value,
                               platform::peer_address(&barriers[place], peer));
        }
      } else if (lane < kAtOnce) {
        *reinterpret_cast<uint4*>(area(i) + n * at.exchanged + to) = value;
      }
    }
    __syncwarp();  // before the next pieces overwrite these
  }

  __device__ __forceinline__ void sent(int i) const {
    if (kResidency != kGrid) return;
    __syncthreads();
    if (threadIdx.x == 0) platform::store_release(flag(rank), i);
  }

 private:
  // Waits until all blocks of a grid's group have sent operand i. Each thread polls other flags:
  // one after the other they would take a trip to the L2 cache each.
  __device__ __forceinline__ void await(int i) const {
    for (int block = threadIdx.x; block < at.active; block += blockDim.x) poll(block, i);
    __syncthreads();
  }

  // In a grid registers are few, so addresses are computed where they are used.
  __device__ __forceinline__ uint32_t* flag(int block) const {
    const int before = platform::opaque(task) * at.active;
    return reinterpret_cast<uint32_t*>(platform::moved(flags, before + block, kFlag));
  }
  __device__ __forceinline__ char* area(int i) const {
    return platform::moved(areas, 2 * platform::opaque(task) + (i & 1), columns * at.exchanged);
  }

  // Copies this warp's share of its slice, when all of the slice has been sent.
  __device__ __forceinline__ void receive(int i) const {
    const int own = platform::opaque(slice);
    const int threads = at.groups * kWarp, thread = threadIdx.x - own * threads;
    const int begin = own * at.depth * kKBlock, rest = begin + at.resident * kKBlock;
    int end = begin + at.depth * kKBlock;
    end = end < at.exchanged ? end : at.exchanged;
    for (int block = producer + thread; block * owned < end; block += threads) poll(block, i);
    meet();
    const char* from = area(i);
    const auto copy = [&](int begin, int end, int power) {
      for (int piece = thread; piece < columns << power; piece += threads) {
        const int n = piece >> power, k = begin + (piece & ((1 << power) - 1)) * kPiece;
        if (k >= end) continue;
        platform::copy_async16(tiles + n * at.pitch + k,
                               platform::moved(from, n * at.exchanged + k, 1), true);
      }
      platform::copy_async_commit();
    };
    copy(begin, rest < end ? rest : end, platform::opaque(at.copying));
    copy(rest, end, platform::opaque(at.copying_rest));
  }

  // The barrier of the warps of a slice. The barriers of row groups have the numbers before.
  __device__ __forceinline__ void meet() const {
    platform::named_barrier(1 + at.groups + slice, at.groups * kWarp);
  }

  __device__ __forceinline__ void poll(int block, int i) const {
    const uint32_t* sent = flag(block);
    const platform::Watch watch;
    while (platform::load_acquire(sent) < static_cast<uint32_t>(i)) watch.look();
  }
};

}  // namespace tile
}  // namespace fastrnn
