"""What follows from a cell: derivative, C++, Triton, a library compiled at run time."""
