"""Inputs as a language model would give them: hidden states and a head whose logits are peaked."""

import math
from dataclasses import dataclass

import torch

import popsd
from popsd_benchmarks.results import Case, Shape

FAVOURITES = 4
CPU_SHAPE = Shape(name="cpu", tokens=512, vocab=32768, width=512)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="qwen3-1.7b", tokens=8192, vocab=151936, used=151669, width=2048),
        Shape(name="qwen3-8b", tokens=8192, vocab=151936, used=151669, width=4096),
        Shape(name="qwen3-4b", tokens=8192, vocab=151936, used=151669, width=2560),
        Shape(name="llama-3-8b", tokens=8192, vocab=128256, width=4096),
        Shape(name="gemma-2-2b", tokens=8192, vocab=256000, width=2304, softcap=30.0),
        Shape(name="gemma-2-9b", tokens=8192, vocab=256000, width=3584, softcap=30.0),
        CPU_SHAPE,
        Shape(name="tiny", tokens=48, vocab=1537, width=32),
    )
}
"""Heads of real models, and two shapes of our own."""


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


def matmuls(case: Case) -> int:
    """How many matmuls [N, D]·[D, V] the loss and its gradients need at least.

    One per projected stream (student and target; student, base and teacher − reference, which come apart under a soft
    cap), one for d/d hidden and one for d/d weight where the head is trained.
    """
    streams = 2 if case.loss == "two" else 3 if case.shape.softcap is None else 4
    return streams + 1 + case.trainable_head


def operations(case: Case) -> float:
    """Floating-point operations of those matmuls."""
    return 2.0 * matmuls(case) * case.shape.tokens * case.shape.vocab * case.shape.width
