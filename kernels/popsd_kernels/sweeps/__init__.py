"""Kernels that read rows of logits, each beside its launcher."""
