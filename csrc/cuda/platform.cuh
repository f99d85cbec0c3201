// Everything that differs between a GPU and the simulator of the tests, written for both: inline
// PTX, builtins, launches. Kernels use only these and plain C++: the same file is compiled by nvcc
// and, with -DFASTRNN_CUDASIM, by a C++ compiler, to run on the CPU (tests/cudasim).
//
// Functions of the same shape stay apart, so that each can be checked against the manual by itself:
// it is one instruction, its simulation, and a trap for GPUs that lack it.
//
// Clusters, mbarriers and asynchronous stores need compute capability 9.0. Below that these
// functions trap, so that every kernel compiles for every GPU.
#pragma once

#include "cuda/platform/compiler.cuh"
#include "cuda/platform/launch.cuh"
#include "cuda/platform/matrix.cuh"
#include "cuda/platform/memory.cuh"
#include "cuda/platform/numbers.cuh"
