"""Liger's two fused JSDs. Both return the mean over tokens and use popsd's convention of ``beta``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import FROZEN_IS_TRAINED, TWO_ONLY, Provider, Step, missing
from popsd_benchmarks.results import Case


def _refuses(case: Case) -> str | None:
    if case.loss == "purified":
        return TWO_ONLY
    return "has no soft cap" if case.shape.softcap is not None else None


@dataclass(frozen=True)
class LigerTriton(Provider):
    """`LigerFusedLinearJSD`: chunks of tokens, float32 logits, the gradient in forward."""

    name: str = "liger-triton"
    mean = True

    def available(self) -> str | None:
        return missing("liger_kernel.transformers.fused_linear_jsd")

    def supports(self, case: Case) -> str | None:
        return "Triton kernels need a GPU" if case.device == "cpu" else _refuses(case)

    def prepare(self, problem: Problem) -> Step:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        hidden, weight = problem.hidden, problem.head.weight
        loss_fn = LigerFusedLinearJSD(jsd_beta=problem.config.beta)

        def step() -> torch.Tensor:
            loss = loss_fn(hidden.student, weight, hidden.teacher, weight.detach(), None)
            loss.backward()
            return loss.detach()

        return step


@dataclass(frozen=True)
class LigerChunked(Provider):
    """`LigerFusedLinearJSDLoss` without its cross-entropy: chunks of 1024 tokens, by torch.func, compiled or not."""

    name: str
    compiles: bool
    mean = True

    def available(self) -> str | None:
        return missing("liger_kernel.chunked_loss.jsd_loss")

    def supports(self, case: Case) -> str | None:
        return _refuses(case)

    def remark(self, case: Case) -> str:
        return "" if case.trainable_head else FROZEN_IS_TRAINED

    def prepare(self, problem: Problem) -> Step:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        hidden, weight = problem.hidden, problem.head.weight
        loss_fn = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=problem.config.beta, compiled=self.compiles
        )
        labels = torch.zeros(hidden.student.shape[0], dtype=torch.long, device=weight.device)

        def step() -> torch.Tensor:
            loss = loss_fn(hidden.student, weight, hidden.teacher, weight.detach(), labels)
            loss.backward()
            return loss.detach()

        return step
