"""Inputs as a language model would give them: hidden states and a head whose logits are peaked."""

import math
from dataclasses import dataclass

import torch

import popsd
from popsd_benchmarks.cases import Case

FAVOURITES = 4


@dataclass(frozen=True)
class Problem:
    """What a provider gets. With two distributions ``hidden.teacher`` is the target, and base and reference are None.

    ``hidden.student`` is a leaf that takes gradient, ``head.weight`` too where the case trains the head. The quantity to
    minimise is the sum over the tokens of the divergence.
    """

    case: Case
    hidden: popsd.HiddenStates
    head: popsd.Head
    config: popsd.PurifiedConfig

    def clear(self) -> None:
        """Forget the gradients."""
        self.hidden.student.grad = self.head.weight.grad = None


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Logits with a Gaussian bulk of standard deviation ``case.deviation`` and, per token, four favourites 6 to 14 above it.

    Base, student, teacher and reference share them; beside the base the student is shifted by a tenth of ``case.spread``,
    the teacher by all of it and the reference by twice as much, as shares of the hidden states' deviation: 1 %, 10 % and
    20 % by default. Drawn in float32 and rounded to the case's dtype; the float64 truth is that of the rounded inputs.
    """
    shape, device = case.shape, torch.device(case.device)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.vocab, shape.width).div_(math.sqrt(shape.width))
    base = case.deviation * normal(shape.tokens, shape.width)
    drawn = (shape.tokens, FAVOURITES)
    favourites = torch.randint(shape.used or shape.vocab, drawn, generator=generator, device=device)
    boost = 6 + 8 * torch.rand(shape.tokens, FAVOURITES, 1, generator=generator, device=device)
    base += (boost * weight[favourites]).sum(1)  # rows have norm 1 and are nearly orthogonal
    deviation = base.std()

    def shifted(share: float) -> torch.Tensor:
        return (base + share * case.spread * deviation * normal(shape.tokens, shape.width)).to(dtype)

    student, teacher = shifted(0.1).requires_grad_(), shifted(1.0)
    purified = case.loss == "purified"
    rest = (base.to(dtype), shifted(2.0)) if purified else (None, None)
    hidden = popsd.HiddenStates(student, rest[0], teacher, rest[1])
    head = popsd.Head(weight.to(dtype).requires_grad_(case.trainable_head), softcap=shape.softcap)
    config = popsd.PurifiedConfig(beta=case.beta, vocab_size=shape.used)
    return Problem(case, hidden, head, config)
