// What differs between a GPU and the simulator of the tests, spelled twice: inline PTX, builtins,
// launches. A kernel uses these and plain C++, no more: the same file is compiled by nvcc, and by a
// C++ compiler with -DFASTRNN_CUDASIM, to run on the CPU (tests/cudasim).
//
// Functions of one shape stay apart even so: each is its instruction, what the simulator has in its
// place, and a trap where the GPU lacks it, and is to be read beside the manual by itself.
//
// Clusters, mbarriers and asynchronous stores need compute capability 9.0. Below that these
// functions trap, so that every kernel compiles for every GPU.
#pragma once

#include "cuda/platform/compiler.cuh"
#include "cuda/platform/launch.cuh"
#include "cuda/platform/matrix.cuh"
#include "cuda/platform/memory.cuh"
#include "cuda/platform/numbers.cuh"
