"""The interface of everything that is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.results import Case

Step = Callable[[], torch.Tensor | None]
"""Forward and backward once. Gradients end up in the problem's leaves; returns the loss, [N] or a scalar, detached."""

TWO_ONLY = "has no loss over four distributions"
FROZEN_IS_TRAINED = "forms dW whether the head is trained or not"


class Provider:
    """Something that is measured; what it answers here is what most do.

    mean: its scalar, and so its gradients, are those of the mean over tokens and not of the sum. It is judged after
        multiplication by N, but timed as its users run it: an upstream gradient of 1 is its fast path.
    computes_loss: False for the bare matmuls, which have nothing to be judged by.
    drops_padding: rows of the head beyond ``Shape.used`` stay out of its softmax. It is judged by the loss it claims.
    compiles: its first call compiles for minutes and memory that later calls do not need.
    """

    name: str
    mean: bool = False
    computes_loss: bool = True
    drops_padding: bool = False
    compiles: bool = False

    def full_buffers(self, case: Case) -> float:
        """Float32 [N, V] tensors that it holds at once. On a CPU too many of them end the process, not the cell."""
        return 0.0

    def available(self) -> str | None:
        """None, or why it cannot run on this installation."""
        return None

    def supports(self, case: Case) -> str | None:
        """None, or why it cannot do the case."""
        return None

    def remark(self, case: Case) -> str:
        """What a reader of its figures on this case must know, or nothing."""
        return ""

    def prepare(self, problem: Problem) -> Step:
        raise NotImplementedError


def missing(*modules: str) -> str | None:
    """Why these modules cannot be imported, or None. Importing, not finding: a peer may break on this torch."""
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's import may fail in any way
            return f"{module}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return None
