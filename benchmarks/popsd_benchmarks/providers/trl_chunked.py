"""TRL's tiled divergence, which recomputes the logits in backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import TWO_ONLY, Provider, Step, missing
from popsd_benchmarks.results import Case


@dataclass(frozen=True)
class TrlChunked(Provider):
    """`ChunkedDivergenceFunction`: Triton on a GPU, its torch fallback elsewhere. Per-token output, same ``beta``."""

    name: str = "trl"

    def available(self) -> str | None:
        return missing("trl.kernels.chunked_divergence")

    def supports(self, case: Case) -> str | None:
        return TWO_ONLY if case.loss == "purified" else None

    def remark(self, case: Case) -> str:
        return "torch fallback" if case.device == "cpu" else ""

    def prepare(self, problem: Problem) -> Step:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        hidden, weight, cap = problem.hidden, problem.head.weight, problem.head.softcap

        def step() -> torch.Tensor:
            student, teacher = (hidden.student, weight, None), (hidden.teacher, weight.detach(), None)
            loss, _ = ChunkedDivergenceFunction.apply(*student, *teacher, problem.config.beta, 1.0, 1.0, cap, 1.0, cap)
            loss.sum().backward()
            return loss.detach()

        return step
