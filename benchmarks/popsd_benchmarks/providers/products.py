"""The floor: the matrix products alone, as many as the loss needs, into buffers that exist already."""

from __future__ import annotations

import torch

from popsd_benchmarks.problems import Problem, products
from popsd_benchmarks.providers.base import Defaults, Step

CHUNK = 2048
"""Rows at a time on a GPU, where [N, V] float32 may not fit: the products fill it from 512 rows on."""


class Products(Defaults):
    """Projections with float32 output, as the loss needs them, the gradient's in the dtype of the inputs."""

    name = "products"
    computes_loss = False

    def prepare(self, problem: Problem) -> Step:
        case, weight = problem.case, problem.head.weight.detach()
        streams = products(case) - 1 - case.trainable_head
        hidden = problem.hidden.student.detach()
        rows = min(case.shape.tokens, CHUNK)
        logits = torch.empty(rows, case.shape.vocab, device=weight.device)
        gradient = logits.to(weight.dtype).normal_()
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

        def step() -> None:
            for part, out in zip(hidden.split(rows), dhidden.split(rows), strict=True):
                n = part.shape[0]
                for _ in range(streams):
                    _project(part, weight, logits[:n])
                torch.mm(gradient[:n], weight, out=out)
                if case.trainable_head:
                    torch.mm(gradient[:n].t(), part, out=dweight)

        return step


def _project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:  # no 16-bit product with float32 output on a CPU; the fastest there is stays the floor
        torch.mm(hidden, weight.t())
