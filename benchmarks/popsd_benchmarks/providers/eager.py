"""Full logits in plain PyTorch, as a research script writes the loss, and the same under torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import popsd
from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import Provider
from popsd_benchmarks.results import Case


def full_logit_loss(
    hidden: popsd.HiddenStates, weight: torch.Tensor, problem: Problem, logits_in_float32: bool
) -> torch.Tensor:
    """[N]: every stream's logits at once, autograd through the student's."""
    config, softcap = problem.config, problem.head.softcap

    def log_probs(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = states.float() @ rows.float().T if logits_in_float32 else (states @ rows.T).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.log_softmax(logits / config.temperature, dim=-1)

    log_p = log_probs(hidden.student, weight)
    with torch.no_grad():
        frozen = weight.detach()
        log_q = log_probs(hidden.teacher, frozen)
        if hidden.base is not None and hidden.reference is not None and config.pmi_clip is not None:
            log_base, log_reference = log_probs(hidden.base, frozen), log_probs(hidden.reference, frozen)
            delta = log_q - log_reference
            delta = delta - delta.mean(dim=-1, keepdim=True)
            delta = config.pmi_clip * torch.tanh(delta / config.pmi_clip)
            log_q = F.log_softmax(log_base + delta / config.pmi_beta, dim=-1)

    def kl(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if config.beta in (0.0, 1.0):
        return kl(log_p, log_q) if config.beta else kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(1 - config.beta), log_q + math.log(config.beta))
    return config.beta * kl(log_q, log_m) + (1 - config.beta) * kl(log_p, log_m)


@dataclass(frozen=True)
class Eager(Provider):
    """logits_in_float32: False leaves the logits in the inputs' 16 bits, and only then goes to float32, as
    ``model(...).logits.float()`` does; True multiplies in float32.
    """

    name: str
    logits_in_float32: bool = True
    compiles: bool = False

    def full_buffers(self, case: Case) -> float:
        return 15.0 if case.loss == "purified" else 10.0

    def supports(self, case: Case) -> str | None:
        return "the inputs are float32: see eager" if not self.logits_in_float32 and case.dtype == "float32" else None

    def loss(self, problem: Problem) -> Callable[[], torch.Tensor]:
        weight = problem.head.weight

        def forward(*streams: torch.Tensor | None) -> torch.Tensor:
            return full_logit_loss(popsd.HiddenStates(*streams), weight, problem, self.logits_in_float32)  # type: ignore[arg-type]

        run: Callable[..., torch.Tensor] = torch.compile(forward, dynamic=False) if self.compiles else forward
        return lambda: run(*problem.hidden)
