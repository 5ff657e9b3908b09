"""The interface of everything that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from popsd_benchmarks.cells import Case
from popsd_benchmarks.problems import Problem

Step = Callable[[], torch.Tensor | None]
"""Forward and backward once. Gradients end up in the problem's leaves; returns the loss, [N] or a scalar, detached."""

TWO_ONLY = "has no loss over four distributions"
FROZEN_IS_TRAINED = "forms dW whether the head is trained or not"


class Provider(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def mean(self) -> bool:
        """Whether its scalar, and so its gradients, are those of the mean over tokens and not of the sum.

        Judged after multiplication by N, but timed as its users run it: an upstream gradient of 1 is its fast path.
        """

    @property
    def computes_loss(self) -> bool:
        """False for the bare matmuls, which have nothing to be judged by."""

    @property
    def drops_padding(self) -> bool:
        """Whether rows of the head beyond ``Shape.used`` stay out of its softmax. It is judged by the loss it claims."""

    @property
    def compiles(self) -> bool:
        """Whether its first call compiles for minutes and memory that later calls do not need."""

    def full_buffers(self, case: Case) -> float:
        """Float32 [N, V] tensors that it holds at once; 0 if it never holds one.

        On a CPU too many of them end the process, not the cell.
        """

    def available(self) -> str | None:
        """None, or why it cannot run on this installation."""

    def supports(self, case: Case) -> str | None:
        """None, or why it cannot do the case."""

    def remark(self, case: Case) -> str:
        """What a reader of its figures on this case must know, or nothing."""

    def prepare(self, problem: Problem) -> Step: ...


class Defaults:
    """What most providers answer."""

    name: str
    mean = False
    computes_loss = True
    drops_padding = False
    compiles = False

    def full_buffers(self, case: Case) -> float:
        return 0.0

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return None

    def remark(self, case: Case) -> str:
        return ""


def missing(*modules: str) -> str | None:
    """Why these modules cannot be imported, or None. Importing, not finding: a peer may break on this torch."""
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer's import may fail in any way
            return f"{module}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return None
