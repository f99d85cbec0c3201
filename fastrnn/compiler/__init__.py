"""A small compiler for cells: derivative, C++, Triton, a library compiled at run time."""
