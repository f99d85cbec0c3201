// What the library of CPU kernels exports (all else in it is hidden), and what is compiled once.
#pragma once

#define FASTRNN_EXPORTED __attribute__((visibility("default")))

// Code that tiles of every size end in. A custom cell has it once, since its user waits for the
// compiler; in the library it is a part of each tile, which is 1 to 3 % faster.
#ifdef FASTRNN_PART
#define FASTRNN_ONCE __attribute__((noinline))
#else
#define FASTRNN_ONCE FASTRNN_INLINE
#endif

// Code that is the same for all cells, where a call costs nothing beside what it does. The library
// exports it for its own instruction sets and formats. The library of a custom cell (FASTRNN_PART)
// declares it and takes it from there, which halves the time that its compilation takes. Its types
// are exported too, or it would be hidden like them.
#ifdef FASTRNN_PART
#define FASTRNN_SHARED __attribute__((noinline, visibility("default")))
#else
#define FASTRNN_SHARED __attribute__((noinline, used, visibility("default")))
#endif
