"""What popsd is compared with first: the floor, which is the matmuls that a loss needs, and full logits in plain PyTorch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from popsd_benchmarks.cases import matmuls
from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers.base import Compute, Provider, Step

CHUNK = 2048
"""Rows at a time on a GPU, where [N, V] float32 may not fit: the matmuls fill it from 512 rows on."""


@dataclass(frozen=True)
class Matmuls(Provider):
    """Projections with float32 output, as the loss needs them, the gradient's in the dtype of the inputs."""

    computes_loss: bool = False

    def prepare(self, problem: Problem) -> Step:
        case, weight = problem.case, problem.head.weight.detach()
        streams = matmuls(case) - 1 - case.trainable_head
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


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Into ``out`` [N, V] float32: the one way in which anything here multiplies by a head."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:  # no 16-bit matmul with float32 output on a CPU; the fastest there is stays the floor
        torch.mm(hidden, weight.t())


def eager(problem: Problem, logits_in_float32: bool = True, compiled: bool = False) -> Compute:
    """The loss as a good engineer writes it with autograd: all logits at once, and the frozen streams' work in place.

    logits_in_float32: False leaves the logits in the inputs' 16 bits, and only then goes to float32, as
    ``model(...).logits.float()`` does; True multiplies in float32.
    """
    config, softcap, weight = problem.config, problem.head.softcap, problem.head.weight

    def logits(states: torch.Tensor) -> torch.Tensor:
        found = states.float() @ weight.float().T if logits_in_float32 else (states @ weight.T).float()
        found = found if softcap is None else softcap * torch.tanh(found / softcap)
        return found if config.temperature == 1.0 else found / config.temperature

    @torch.no_grad()
    def target(teacher: torch.Tensor, base: torch.Tensor | None, reference: torch.Tensor | None) -> torch.Tensor:
        """Its log-probabilities. The normalisers of teacher and reference vanish with the mean of their difference."""
        found = logits(teacher)
        if base is not None and reference is not None:
            clip = config.pmi_clip
            assert clip is not None
            found.sub_(logits(reference))
            found.sub_(found.mean(dim=-1, keepdim=True)).div_(clip).tanh_().mul_(clip / config.pmi_beta)
            found.add_(logits(base))
        return found.log_softmax(dim=-1)

    def forward(*streams: torch.Tensor | None) -> torch.Tensor:
        student, base, teacher, reference = streams
        assert student is not None and teacher is not None
        log_q, beta = target(teacher, base, reference), config.beta
        log_p = logits(student).log_softmax(dim=-1)
        if beta == 0.0:
            return torch.linalg.vecdot(log_q.exp(), log_q - log_p)
        with torch.no_grad():  # the mixture m and log p are constants of the gradient: Σ m·d(log m) = dΣ m = 0
            log_m = log_q
            if beta < 1.0:
                log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
            target_kl = torch.linalg.vecdot(log_q.exp(), log_q - log_m)
            log_ratio = log_p - log_m
        student_kl = torch.linalg.vecdot(log_p.exp(), log_ratio)
        return student_kl if beta == 1.0 else beta * target_kl + (1 - beta) * student_kl

    run: Callable[..., torch.Tensor] = torch.compile(forward, dynamic=False) if compiled else forward
    return lambda: run(*problem.hidden)
