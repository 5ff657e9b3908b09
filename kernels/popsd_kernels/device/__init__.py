"""Functions that run inside kernels, one formula each. Importing a module of this package imports Triton."""
