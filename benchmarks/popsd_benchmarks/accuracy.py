"""Loss and gradients of a provider against float64 on the very same inputs, and how wrong is too wrong for a speed figure."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from popsd import Head, HiddenStates, PurifiedConfig, oracle
from popsd.testing import relative_l2, true_jsd, true_purified
from popsd_benchmarks.problems import Problem
from popsd_benchmarks.providers import Provider

LOSS = {"float32": 2e-5, "bfloat16": 2e-3}
GRADIENT = {"float32": 2e-5, "bfloat16": 6e-3}
"""Largest relative L2 errors. Rounding a right gradient to bfloat16 costs 2e-3; float32 logits near 20 round at 1e-6, and
what is left of them where student and target agree within a percent is 2e-5."""
LOSS_FLOOR = 1e-6
"""Nats per token that a loss may be off whatever its size."""

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Float64 entries per [rows, V] tensor of the oracle, which holds some twenty."""


class Exact(NamedTuple):
    """Per-token loss and d Σ loss, at the judged rows. kl: mean KL(target ‖ student) in nats."""

    loss: torch.Tensor
    dhidden: torch.Tensor
    dweight: torch.Tensor
    kl: float


class Judge:
    """rows: how many tokens to look at, spread evenly; None, or a trained head, whose dW needs them all: every token."""

    def __init__(self, problem: Problem, rows: int | None = None) -> None:
        tokens, self.problem = problem.case.shape.tokens, problem
        count = tokens if rows is None or problem.case.trainable_head else min(rows, tokens)
        self.complete = count == tokens
        self.index = torch.arange(count, device=problem.case.device) * (tokens - 1) // max(count - 1, 1)
        self.known: dict[bool, Exact] = {}

    def exact(self, drops_padding: bool) -> Exact:
        """The oracle's answer, with or without the head's padding rows in the softmax."""
        drops_padding = drops_padding or self.problem.config.vocab_size is None
        if drops_padding not in self.known:
            config = self.problem.config if drops_padding else replace(self.problem.config, vocab_size=None)
            self.known[drops_padding] = _exact(self.problem, self.index, config)
        return self.known[drops_padding]

    def errors(self, provider: Provider, loss: torch.Tensor) -> dict[str, float]:
        """Relative L2 of what the provider left in the leaves, and of its loss where it can be compared."""
        problem, exact = self.problem, self.exact(provider.drops_padding)
        scale, found = problem.case.shape.tokens if provider.mean else 1, {}
        if loss.ndim:
            found["loss"] = _error(loss[self.index], exact.loss)
        elif self.complete:
            found["loss"] = _error(loss.reshape(1).double() * scale, exact.loss.sum().reshape(1))
        gradient = problem.hidden.student.grad
        gradients = {"dhidden": (None if gradient is None else gradient[self.index], exact.dhidden)}
        if problem.case.trainable_head:
            gradients["dweight"] = (problem.head.weight.grad, exact.dweight)
        for name, (value, expected) in gradients.items():
            found[name] = math.inf if value is None else _error(value.double() * scale, expected)
        return found

    def complaint(self, provider: Provider, errors: dict[str, float]) -> str | None:
        """Which bound was broken, or None."""
        dtype, exact = self.problem.case.dtype, self.exact(provider.drops_padding)
        floor = LOSS_FLOOR / max(float(exact.loss.mean().abs()), 1e-300)
        bounds = {"loss": LOSS[dtype] + floor, "dhidden": GRADIENT[dtype], "dweight": GRADIENT[dtype]}
        broken = [f"{k} off by {x:.1e}, at most {bounds[k]:.1e}" for k, x in errors.items() if not x <= bounds[k]]
        return "; ".join(broken) or None


def _exact(problem: Problem, index: torch.Tensor, config: PurifiedConfig) -> Exact:
    case, heads, dweight = problem.case, (problem.head, problem.head), torch.zeros(0)
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for rows in index.split(max(1, CHUNK_ELEMENTS[case.device] // case.shape.vocab)):
        taken: Any = (None if x is None else x.detach()[rows] for x in problem.hidden)
        hidden, ones = HiddenStates(*taken), torch.ones(len(rows), device=case.device)
        if case.loss == "purified":
            truth = true_purified(hidden, heads, config, ones)
        else:
            truth = true_jsd(hidden.student, hidden.teacher, heads, config, ones)
        if case.trainable_head:  # [V, D] in float64 is 5 GB of a large model, to be kept where it is needed
            dweight = truth.dweight if not parts else dweight.add_(truth.dweight)
        parts.append((truth.loss, truth.dhidden, _forward_kl(hidden, problem.head, config)))
    loss, dhidden, kl = (torch.cat(x) for x in zip(*parts, strict=True))
    return Exact(loss, dhidden, dweight, float(kl.mean()))


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_l2(value, expected) if bool(torch.isfinite(value).all()) else math.inf


@torch.no_grad()
def _forward_kl(hidden: HiddenStates, head: Head, config: PurifiedConfig) -> torch.Tensor:
    student, base, teacher, reference = (None if x is None else oracle.head_logits(x, head) for x in hidden)
    config = replace(config, beta=0.0)
    assert student is not None and teacher is not None
    if base is None or reference is None:
        return oracle.jsd(student, teacher, config)
    return oracle.purified_jsd(student, base, teacher, reference, config)
