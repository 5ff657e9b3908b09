"""The interface of everything that is measured."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.results import Case

Compute = Callable[[], torch.Tensor]
Step = Callable[[], torch.Tensor | None]
"""Forward and backward once. Gradients end up in the problem's leaves; returns the loss, [N] or a scalar, detached."""


@dataclass(frozen=True)
class Provider:
    """Something that is measured: a name and what prepares its loss. A subclass has a `prepare` of its own instead.

    loss: from a problem to what computes the loss, [N] or a scalar, anew at every call. module: imported for it.
    four, softcap, on_cpu: whether it has a loss over four distributions, a soft cap, a CPU backend.
    mean: its scalar, and so its gradients, are those of the mean over tokens and not of the sum. It is judged after
        multiplication by N, but timed as its users run it: an upstream gradient of 1 is its fast path.
    computes_loss: False for what has nothing to be judged by. compiles: its first call takes time and memory of its own.
    drops_padding: rows of the head beyond ``Shape.used`` stay out of its softmax. It is judged by the loss it claims.
    only_16_bit: with float32 inputs it would be another provider.
    buffers: float32 [N, V] tensors that it holds at once with (four, two) distributions on a CPU, where too many of them
        end the process, not the cell.
    cpu_note, frozen_note: what a reader of its figures on a CPU, or with a frozen head, must know.
    """

    name: str
    loss: Callable[[Problem], Compute] | None = None
    module: str = ""
    four: bool = True
    softcap: bool = True
    on_cpu: bool = True
    mean: bool = False
    computes_loss: bool = True
    drops_padding: bool = False
    compiles: bool = False
    only_16_bit: bool = False
    buffers: tuple[float, float] = (0.0, 0.0)
    cpu_note: str = ""
    frozen_note: str = ""

    def available(self) -> str | None:
        """None, or why it cannot run on this installation."""
        return missing(self.module) if self.module else None

    def supports(self, case: Case) -> str | None:
        """None, or why it cannot do the case."""
        if case.device == "cpu" and not self.on_cpu:
            return "Triton kernels need a GPU"
        if case.loss == "purified" and not self.four:
            return "has no loss over four distributions"
        if self.only_16_bit and case.dtype == "float32":
            return "the inputs are float32: see eager"
        return "has no soft cap" if case.shape.softcap is not None and not self.softcap else None

    def remark(self, case: Case) -> str:
        """What a reader of its figures on this case must know, or nothing."""
        notes = (self.cpu_note, case.device == "cpu"), (self.frozen_note, not case.trainable_head)
        return "; ".join(note for note, wanted in notes if wanted and note)

    def prepare(self, problem: Problem) -> Step:
        assert self.loss is not None
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
        return f"{module}: {type(error).__name__}: {error}".splitlines()[0]
    return None
