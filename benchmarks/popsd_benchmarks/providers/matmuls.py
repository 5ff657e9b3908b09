"""The floor: the matmuls alone, as many as the loss needs, into buffers that exist already."""

from __future__ import annotations

import torch

from popsd_benchmarks.problems import Problem, matmuls
from popsd_benchmarks.providers.base import Provider, Step
from popsd_benchmarks.results import Case

CHUNK = 2048
"""Rows at a time on a GPU, where [N, V] float32 may not fit: the matmuls fill it from 512 rows on."""


class Matmuls(Provider):
    """Projections with float32 output, as the loss needs them, the gradient's in the dtype of the inputs."""

    name = "matmuls"
    computes_loss = False

    def projections(self, case: Case) -> int:
        return matmuls(case) - 1 - case.trainable_head

    def prepare(self, problem: Problem) -> Step:
        case, weight = problem.case, problem.head.weight.detach()
        streams = self.projections(case)
        hidden = problem.hidden.student.detach()
        rows = min(case.shape.tokens, CHUNK)
        logits = torch.empty(rows, case.shape.vocab, device=weight.device)
        gradient = logits.to(weight.dtype).normal_()
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

        def step() -> None:
            for part, out in zip(hidden.split(rows), dhidden.split(rows), strict=True):
                n = part.shape[0]
                for _ in range(streams):
                    project(part, weight, logits[:n])
                torch.mm(gradient[:n], weight, out=out)
                if case.trainable_head:
                    torch.mm(gradient[:n].t(), part, out=dweight)

        return step


class RecomputingPort(Matmuls):
    """What a port of TRL's scheme to four distributions would spend on matmuls alone: an estimate, from below.

    Tiles of the vocabulary leave no logits behind, so each pass projects all four streams again: normalisers, divergence
    (one pass where it needs no mixture), gradient. 13 matmuls with the one for d/d hidden; its sweeps would come on top.
    """

    name = "trl-port-estimate"

    def supports(self, case: Case) -> str | None:
        return None if case.loss == "purified" else "an estimate of four distributions: with two, see trl"

    def remark(self, case: Case) -> str:
        return f"estimate: {self.projections(case) + 1 + case.trainable_head} bare matmuls of a port that nobody has written"

    def projections(self, case: Case) -> int:
        return 4 * (3 if 0 < case.beta < 1 else 2)


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Into ``out`` [N, V] float32: the one way in which anything here multiplies by a head."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:  # no 16-bit matmul with float32 output on a CPU; the fastest there is stays the floor
        torch.mm(hidden, weight.t())
