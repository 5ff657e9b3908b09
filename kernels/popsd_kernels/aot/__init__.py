"""Compiles every kernel for five GPUs without having one: ``python -m popsd_kernels.aot``."""
