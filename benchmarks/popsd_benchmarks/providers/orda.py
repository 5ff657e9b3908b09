"""orda-kernel's fused distillation loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import TWO_ONLY, Provider, Step, missing
from popsd_benchmarks.results import Case


@dataclass(frozen=True)
class Orda(Provider):
    """`distillation_loss` with its divergence alone, summed over tokens, of a tied teacher.

    Its ``kl_beta`` is the student's share of the mixture: 1 − beta. On a CPU it forms all logits.
    """

    name: str = "orda"

    def full_buffers(self, case: Case) -> float:
        return 15.0 if case.device == "cpu" else 0.0

    def available(self) -> str | None:
        return missing("orda_kernel")

    def supports(self, case: Case) -> str | None:
        if case.loss == "purified":
            return TWO_ONLY
        return "has no soft cap" if case.shape.softcap is not None else None

    def remark(self, case: Case) -> str:
        return "forms all logits on a CPU" if case.device == "cpu" else ""

    def prepare(self, problem: Problem) -> Step:
        from orda_kernel import KernelConfig, TiedTeacher, distillation_loss

        hidden, weight, beta = problem.hidden, problem.head.weight, problem.config.beta
        variants: dict[float, dict[str, Any]] = {0.0: {"kl_divergence": "forward"}, 1.0: {"kl_divergence": "reverse"}}
        divergence = variants.get(beta, {"kl_divergence": "skew_js", "kl_beta": 1.0 - beta})
        labels = torch.zeros(hidden.student.shape[0], dtype=torch.long, device=weight.device)

        def step() -> torch.Tensor:
            loss = distillation_loss(
                hidden.student,
                weight,
                labels,
                TiedTeacher(hidden=hidden.teacher),
                student_ce_weight=0.0,
                teacher_ce_weight=0.0,
                kl_weight=1.0,
                reduction="sum",
                backend="triton" if weight.is_cuda else "torch",
                config=KernelConfig(assume_valid_labels=True),
                **divergence,
            ).loss
            loss.backward()
            return loss.detach()

        return step
