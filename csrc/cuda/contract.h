// The contract between the host and the CUDA kernels: plain data, shapes, no ownership. The library
// of these kernels has a C interface and no torch in it: kernels/gpu/cuda.py fills these structs,
// field by field, through ctypes.
//
// T steps, B batch, H hidden units, G gates, S states, K saved values, P recurrences (independent
// scans of the same input: directions, heads), W = S-1+K values of [H] that a row of the tape
// holds. A recurrence's *step* counts in its own direction; `t` is always the position in time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/storage.h"

namespace fastrnn {

// How numbers are stored and multiplied by the recurrent weights. Sums, states, their gradients and
// the cell's arithmetic are in float, except for kFloat64.
enum class Precision : int32_t {
  kFloat64 = 0,
  kFloat32 = 1,  // stored and multiplied in float
  kTf32 = 2,     // stored in float, multiplied as TF32
  kTf32x3 = 3,   // stored in float, multiplied in three parts of TF32 each, nearly as float
  kBfloat16 = 4,
  kFloat16 = 5,
};

constexpr int kMostStates = 8;  // of a cell

// One launch: every recurrence through the steps [begin, end) of its own direction. All pointers
// are to memory of the device, contiguous, aligned to 16 bytes. Arrays are in the storage type
// (`stored`) or in the type of sums (`of sums`: float, or double for kFloat64).
struct Sweep {
  int64_t steps = 0;  // T
  int64_t batch = 0;  // B, not 0
  int64_t hidden = 0;
  int64_t recurrences = 0;
  int64_t begin = 0;
  int64_t end = 0;
  // The row at which the chunk begins, for recurrences forward and backward in time. Row r is row
  // r - base of `u`, `du`, `dv` and `h_prev`, and row r of `y`, `dy`, `tape` and `resets`.
  int64_t base = 0;
  int64_t base_reverse = 0;
  int64_t chunk_rows = 0;  // rows of `u`, `du`, `dv`, `h_prev` per recurrence
  // Row r of the tape is row r - tape_base of `tape`: not 0 for the tape of a chunk.
  int64_t tape_base = 0;
  int64_t tape_base_reverse = 0;
  uint64_t reverse = 0;              // a bit per recurrence
  const int64_t* first = nullptr;    // [T+1] row at which a step begins, packed; null: t*B
  const int64_t* length = nullptr;   // [B] steps of each row of the batch; null: T
  const uint8_t* resets = nullptr;   // [rows], whether an episode begins here; or null
  const void* w_hh = nullptr;        // [P, G*H, H], stored
  const void* s0[kMostStates] = {};  // [P, B, H], stored: each state before all steps; null: zeros
  // Forward.
  const void* u = nullptr;     // [P, chunk_rows, G*H], stored; biases included
  const void* b_hh = nullptr;  // [P, G*H], stored, for gates that are not summed; or null
  // [S+1, P, B, H], of sums: states before the chunk, then after it; the last is a second buffer
  // for state 0. Nothing is read before the first chunk, and what the last one leaves is undefined.
  // Persistent kernels need none for a chunk of all steps.
  void* carry = nullptr;
  void* last[kMostStates] = {};  // [P, B, H], stored: receive the states after all steps
  void* y = nullptr;             // [rows, P, H], stored; only read in the backward pass
  void* tape = nullptr;          // [rows, P, W, H], stored, or null; only read in the backward pass
  // Recomputation of a tape that was not saved; u, b_hh, y and tape are as in forward. Its `carry`
  // is [S, P, B, H], and has states before the first chunk, too.
  const void* v = nullptr;  // [P, chunk_rows, G*H], stored: `h_prev` times the recurrent weights
  // Backward, from step end-1 to begin.
  const void* dy = nullptr;             // [rows, P, H], stored, or null for zeros
  const void* dlast[kMostStates] = {};  // [P, B, H], stored: gradients of `last`; null: zeros
  // [S, P, B, H], of sums: gradients of the states after the chunk, then before it; undefined
  // before the last chunk, which comes first, and after the first. Persistent kernels need none for
  // a chunk of all steps.
  void* ds = nullptr;
  // [P, B, H], stored: receive the gradients of `s0`; null: none wanted.
  void* ds0[kMostStates] = {};
  void* du = nullptr;      // [P, chunk_rows, G*H], stored; is `dv` if all gates are summed
  void* dv = nullptr;      // [P, chunk_rows, G*H], stored
  void* h_prev = nullptr;  // [P, chunk_rows, H], stored: state 0 before each step
  // Working memory, see fastrnn_cuda_workspace_bytes; the launch clears what must be zero.
  void* workspace = nullptr;
};

// How a sweep runs; fastrnn/plan chooses it.
struct CudaPlan {
  Precision precision = Precision::kFloat32;
  int32_t residency = 0;   // Residency
  int32_t batch_tile = 8;  // rows of the batch that a group of blocks works on: 8, 16 or 32; for
                           // kStep 16, 32 or 64
  int32_t blocks = 1;      // per group; they share the hidden units of a tile
  int32_t warps = 4;       // per block
  int32_t groups = 1;      // for kGrid: groups that run at the same time; the others follow
  // Units of a row group, the part of one warp or of several that split the depth: one of
  // `CudaTables::row_groups` for the cell's gates, the direction and the batch tile; not for kStep.
  int32_t row_group = 0;
};

enum Residency : int32_t {
  kStep = 0,     // one launch per step, weights from the cache: any H, any precision
  kBlock = 1,    // one block holds all weights of a recurrence
  kCluster = 2,  // a cluster of blocks holds them, and exchanges h through distributed memory
  kGrid = 3,     // a group of blocks anywhere on the device, which exchanges h through the L2 cache
};

// A row group that persistent kernels are compiled for, in every precision with enough registers.
struct CudaRowGroup {
  int32_t backward;    // 0, 1
  int32_t gates;       // G of the cell
  int32_t batch_tile;  // as in the plan
  int32_t units;       // `row_group` of the plan: whole rows of tiles of 16
};

// Constants that the kernels were compiled with; a plan computes from them what a block can hold.
// Indices: `backward` 0 or 1; `split` 1 for kTf32x3, else 0; batch tiles in the order given.
struct CudaTables {
  int32_t recurrences;  // the most of a sweep
  // Persistent kernels. A row group has `tiles` tiles of 16 rows of weights: units * G / 16
  // forward, units / 16 backward.
  int32_t warps;           // the most of a block; also the most row groups
  int32_t k_block_bytes;   // of a k-block; a row of an operand is whole k-blocks
  int32_t piece_bytes;     // of a piece of an operand, which is sent as one
  int32_t row_pad_bytes;   // after a row of an operand in shared memory
  int32_t fragment_bytes;  // of half a k-block of a tile of weights, and of its sums in 8 columns
  int32_t gradient_bytes;  // backward: of the gradients of a state, 16 units by 8 columns
  int32_t stop_bytes;      // backward: of the number of steps of a column of a row group
  int32_t barrier_bytes;   // at the end of a block's shared memory
  int32_t k_block_registers;      // of a thread, for a k-block of a tile of weights
  int32_t staged_gap_bytes[4];    // in n pieces of 8 columns that a warp collects, by n % 4
  int32_t batch_tiles[3];         // rows of the batch
  int32_t registers[2][2][3][4];  // [backward][split][batch tile][tiles - 1, at most 3]: of a
                                  // thread, for weights; 0: there is no such kernel
  // Kernels with one launch per step.
  int32_t step_tiles[3];     // rows of the batch
  int32_t step_units[2][3];  // [backward][step tile] of a block
  // [row_group_count], sorted by the first three fields, the least units first.
  int32_t row_group_count;
  const CudaRowGroup* row_groups;
};

}  // namespace fastrnn

// Unless they say otherwise, these return 0 or a cudaError_t. `cell` is a name of fastrnn/cells.
extern "C" {
int fastrnn_cuda_forward(const char* cell, const fastrnn::Sweep*, const fastrnn::CudaPlan*,
                         void* stream);
int fastrnn_cuda_backward(const char* cell, const fastrnn::Sweep*, const fastrnn::CudaPlan*,
                          void* stream);
// Recomputation. The first call writes `h_prev`, state 0 before each step, from y and state 0 of
// s0. The second needs `v`: it writes the tape, unless that is null, and carries the states past
// the first in `carry` from before the chunk to after it.
int fastrnn_cuda_h_prev(const char* cell, const fastrnn::Sweep*, const fastrnn::CudaPlan*,
                        void* stream);
int fastrnn_cuda_recompute(const char* cell, const fastrnn::Sweep*, const fastrnn::CudaPlan*,
                           void* stream);
// Bytes of `workspace` that a launch needs, whatever its number of steps.
int64_t fastrnn_cuda_workspace_bytes(const char* cell, const fastrnn::Sweep*,
                                     const fastrnn::CudaPlan*, int backward);
// Shared memory per block of a persistent kernel, in bytes; negative if the plan fits no block.
int64_t fastrnn_cuda_shared_bytes(const char* cell, const fastrnn::Sweep*, const fastrnn::CudaPlan*,
                                  int backward);
// Whether the kernels run on the current device, with its driver: 0, or the cudaError_t of a driver
// that is too old, of a GPU for which there is no code, and so on. `architecture` receives what the
// code that runs there was compiled for, 90 for compute capability 9.0.
int fastrnn_cuda_usable(int* architecture);
// The number of clusters of `blocks` blocks, each with `shared_bytes` of shared memory, that run at
// the same time on the current device; 0 if it has none or the code in use was compiled for GPUs
// without them, negative for an error.
int fastrnn_cuda_resident_clusters(int blocks, int threads, int64_t shared_bytes);
// The constants that a plan uses; valid while the library is loaded.
const fastrnn::CudaTables* fastrnn_cuda_tables();
// Whether a CUDA graph is captured on a stream, so that nothing may be copied from the host.
int fastrnn_cuda_capturing(void* stream);
// The text of an error.
const char* fastrnn_cuda_error(int error);
// Names of the cells that this library has kernels for, with a space after each.
const char* fastrnn_cuda_cells();
// Whether this library runs the kernels in the simulator of the tests, on memory of the CPU.
int fastrnn_cuda_simulated();
}
