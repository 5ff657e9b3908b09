"""The interface of everything that is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.results import Case

Step = Callable[[], torch.Tensor | None]
"""Forward and backward once. Gradients end up in the problem's leaves; returns the loss, [N] or a scalar, detached."""


class Provider:
    """Something that is measured. A subclass writes `loss`, or `prepare` where its step is another one.

    module: what has to be imported for it. four, softcap: whether it has a loss over four distributions, and a soft cap.
    mean: its scalar, and so its gradients, are those of the mean over tokens and not of the sum. It is judged after
        multiplication by N, but timed as its users run it: an upstream gradient of 1 is its fast path.
    computes_loss: False for the bare matmuls, which have nothing to be judged by.
    drops_padding: rows of the head beyond ``Shape.used`` stay out of its softmax. It is judged by the loss it claims.
    compiles: its first call takes time and memory that later calls do not need.
    """

    name: str
    module: str = ""
    four: bool = True
    softcap: bool = True
    on_cpu: bool = True
    mean: bool = False
    computes_loss: bool = True
    drops_padding: bool = False
    compiles: bool = False

    def full_buffers(self, case: Case) -> float:
        """Float32 [N, V] tensors that it holds at once. On a CPU too many of them end the process, not the cell."""
        return 0.0

    def available(self) -> str | None:
        """None, or why it cannot run on this installation."""
        return missing(self.module) if self.module else None

    def supports(self, case: Case) -> str | None:
        """None, or why it cannot do the case."""
        if case.device == "cpu" and not self.on_cpu:
            return "Triton kernels need a GPU"
        if case.loss == "purified" and not self.four:
            return "has no loss over four distributions"
        return "has no soft cap" if case.shape.softcap is not None and not self.softcap else None

    def remark(self, case: Case) -> str:
        """What a reader of its figures on this case must know, or nothing."""
        return ""

    def loss(self, problem: Problem) -> Callable[[], torch.Tensor]:
        """What computes the loss, [N] or a scalar, anew at every call."""
        raise NotImplementedError

    def prepare(self, problem: Problem) -> Step:
        compute = self.loss(problem)

        def step() -> torch.Tensor:
            loss = compute()
            (loss.sum() if loss.ndim else loss).backward()
            return loss.detach()

        return step


def missing(module: str) -> str | None:
    """Why this module cannot be imported, or None. Importing, not finding: a peer may break on this torch."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        return f"{module}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return None
