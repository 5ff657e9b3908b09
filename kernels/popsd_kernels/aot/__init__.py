"""Compiles the kernels for GPUs without having one: ``python -m popsd_kernels.aot``."""
