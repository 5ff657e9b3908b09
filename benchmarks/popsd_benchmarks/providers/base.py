"""The interface of everything that is measured."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from popsd_benchmarks.cases import Case
from popsd_benchmarks.problems import Problem

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


def own(name: str) -> list[Provider]:
    """Providers of one's own, called by its place: module:name of a function of the problem, or of a class made with it.

    What comes back is called at every step for the loss, [N] or a scalar, of ``problem.hidden`` and ``problem.head``; gradients
    go by ``backward``. Attributes of the function or class called as a field of `Provider`, such as ``four = False``, say what
    it cannot do. Or a `Provider`, or a list of them. Raises ValueError where there is no such thing.
    """
    module, _, attribute = name.partition(":")
    sys.path[:0] = [] if os.getcwd() in sys.path else [os.getcwd()]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"provider: expected module:name that can be imported; got {name!r} ({error}).") from error
    if isinstance(found, Provider | list):
        return found if isinstance(found, list) else [found]
    if not callable(found):
        raise ValueError(
            f"provider: expected a function of the problem, or a class; got {name!r}, {type(found).__name__}."
        )
    traits = {entry.name: getattr(found, entry.name) for entry in fields(Provider) if hasattr(found, entry.name)}
    return [Provider(**traits | {"name": name, "loss": found})]
