"""Problems with a known student-target distance, their float64 answers, and how far apart two answers are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from popsd import Head, HiddenStates, PurifiedConfig, oracle

Heads = tuple[Head, Head]


class Truth(NamedTuple):
    """Per-token loss and gradients of Σ upstream·loss in float64."""

    loss: torch.Tensor
    dhidden: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor | None


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    """‖value − expected‖ / ‖expected‖ in float64; NaN and inf never pass, and neither does comparing with nothing."""
    value, expected = value.detach().double(), expected.detach().double()
    assert torch.isfinite(value).all(), "not finite"
    norm = expected.norm()
    assert norm > 0, "an answer of zero proves nothing"
    return float((value - expected).norm() / norm)


def make_hidden(
    tokens: int, width: int, spread: float, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> HiddenStates:
    """Four streams around common hidden states; ``spread`` sets how far apart they are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, width, generator=generator)
    streams = (common + spread * torch.randn(tokens, width, generator=generator) for _ in range(4))
    return HiddenStates(*(x.to(dtype) for x in streams))


def make_head(
    vocab: int, width: int, std: float = 3.0, *, seed: int = 1, dtype: torch.dtype = torch.float32, bias: bool = False
) -> Head:
    """A head whose logits have standard deviation ``std`` on unit-variance hidden states, a few rows ten times as long."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator) * (std / width**0.5)
    weight[:: max(vocab // 5, 1)] *= 2.0
    return Head(weight.to(dtype), bias=torch.randn(vocab, generator=generator).to(dtype) if bias else None)


def true_purified(hidden: HiddenStates, heads: Heads, config: PurifiedConfig, upstream: torch.Tensor) -> Truth:
    """The oracle on the very same (possibly 16-bit) inputs."""
    student_head, frozen_head = heads
    student = hidden.student.detach().double().requires_grad_()
    weight = student_head.weight.detach().double().requires_grad_()
    bias = None if student_head.bias is None else student_head.bias.detach().double().requires_grad_()
    head = Head(weight, bias, student_head.logit_scale, student_head.softcap)
    frozen = [oracle.head_logits(x.detach(), frozen_head).detach() for x in hidden[1:]]
    loss = oracle.purified_jsd(oracle.head_logits(student, head), *frozen, config)
    (loss * upstream.double()).sum().backward()
    return Truth(loss.detach(), student.grad, weight.grad, None if bias is None else bias.grad)
