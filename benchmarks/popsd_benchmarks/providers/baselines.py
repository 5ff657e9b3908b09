"""What popsd is compared with first: the floor, which is the matmuls that a loss needs, and full logits in plain PyTorch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import popsd
from popsd_benchmarks.problems import Problem, matmuls
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


def eager(problem: Problem, logits_in_float32: bool = True, compiled: bool = False) -> Compute:
    """logits_in_float32: False leaves the logits in the inputs' 16 bits, and only then goes to float32, as
    ``model(...).logits.float()`` does; True multiplies in float32.
    """

    def forward(*streams: torch.Tensor | None) -> torch.Tensor:
        hidden = popsd.HiddenStates(*streams)  # type: ignore[arg-type]
        return full_logit_loss(hidden, problem.head.weight, problem, logits_in_float32)

    run: Callable[..., torch.Tensor] = torch.compile(forward, dynamic=False) if compiled else forward
    return lambda: run(*problem.hidden)
