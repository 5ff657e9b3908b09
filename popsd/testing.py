"""Problems of realistic difficulty, their float64 answers, and how far apart two answers are: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from popsd import oracle
from popsd.config import DivergenceConfig, PurifiedConfig
from popsd.head import Head
from popsd.outputs import HiddenStates

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
    tokens: int,
    width: int,
    spread: float,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> HiddenStates:
    """Four streams [tokens, width] of unit variance around common hidden states; ``spread`` sets how far apart they are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, width, generator=generator)
    streams = (common + spread * torch.randn(tokens, width, generator=generator) for _ in range(4))
    return HiddenStates(*(x.to(device, dtype) for x in streams))


def make_head(
    vocab: int,
    width: int,
    std: float = 3.0,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = False,
) -> Head:
    """A head whose logits have standard deviation ``std``, five rows of the vocabulary twice that: peaked, as models are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator) * (std / width**0.5)
    weight[:: max(vocab // 5, 1)] *= 2.0
    shift = torch.randn(vocab, generator=generator).to(device, dtype) if bias else None
    return Head(weight.to(device, dtype), bias=shift)


def true_purified(hidden: HiddenStates, heads: Heads, config: PurifiedConfig, upstream: torch.Tensor) -> Truth:
    """The oracle on the very same (possibly 16-bit) inputs."""
    base, teacher, reference = (oracle.head_logits(x, heads[1]).detach() for x in hidden[1:] if x is not None)
    return _truth(
        hidden.student, heads[0], upstream, lambda logits: oracle.purified_jsd(logits, base, teacher, reference, config)
    )


def true_jsd(
    student: torch.Tensor, target: torch.Tensor, heads: Heads, config: DivergenceConfig, upstream: torch.Tensor
) -> Truth:
    """The same for two distributions, from hidden states."""
    target_logits = oracle.head_logits(target, heads[1]).detach()
    return _truth(student, heads[0], upstream, lambda logits: oracle.jsd(logits, target_logits, config))


def _truth(
    student: torch.Tensor, head: Head, upstream: torch.Tensor, divergence: Callable[[torch.Tensor], torch.Tensor]
) -> Truth:
    student, weight = (x.detach().double().requires_grad_() for x in (student, head.weight))
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_()
    loss = divergence(oracle.head_logits(student, Head(weight, bias, head.logit_scale, head.softcap)))
    (loss * upstream.double()).sum().backward()
    assert student.grad is not None and weight.grad is not None
    return Truth(loss.detach(), student.grad, weight.grad, None if bias is None else bias.grad)
