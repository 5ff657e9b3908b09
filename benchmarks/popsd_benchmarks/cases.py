"""What is measured, by name. Nothing here imports torch, so that help and errors of a command come at once."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PARTS = ("table", "accuracy", "tokens", "vocab", "width", "profile")
Loss = Literal["purified", "two"]
LOSSES: tuple[Loss, ...] = ("purified", "two")
FLOOR = "matmuls"
OURS = {"cpu": "popsd-torch", "cuda": "popsd-triton"}
"""Whose time every other is divided by."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """tokens N, vocab V rows of the head, used: leading rows in use (None: all), width D; softcap of the head or None."""

    name: str
    tokens: int
    vocab: int
    width: int
    used: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """loss: "purified" over four distributions, or the "two"-distribution generalised JSD. dtype: "float32" or "bfloat16".

    spread: how far apart the streams are, a share of the hidden states' deviation; it sets the divergence.
    deviation: of the logits' bulk.
    """

    loss: Loss
    shape: Shape
    trainable_head: bool = False
    beta: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"
    spread: float = 0.1
    deviation: float = 2.0


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


class Look(NamedTuple):
    """Of a provider in pictures."""

    colour: str
    line: Any = "-"
    label: str = ""


# Okabe-Ito: told apart by colour-blind readers too. A family has a colour, its members a line each.
LOOKS = {
    "popsd-torch": Look("#0072B2", "-", "popsd"),
    "popsd-triton": Look("#0072B2", "-", "popsd"),
    "popsd-graph": Look("#0072B2", "--", "popsd, CUDA graph"),
    "popsd-single-read": Look("#56B4E9", "-", "popsd, single read"),
    "popsd-streaming": Look("#56B4E9", "--", "popsd, streaming"),
    "matmuls": Look("#000000", ":", "bare matmuls"),
    "eager": Look("#D55E00", "-", "eager"),
    "eager-16bit-logits": Look("#D55E00", "--", "eager, bf16 logits"),
    "eager-compiled": Look("#D55E00", ":", "torch.compile"),
    "trl": Look("#009E73", "-", "TRL"),
    "liger-triton": Look("#CC79A7", "-", "Liger fused"),
    "liger-chunked": Look("#CC79A7", "--", "Liger chunked"),
    "liger-compiled": Look("#CC79A7", ":", "Liger chunked, compiled"),
    "orda": Look("#E69F00", "-", "orda-kernel"),
}
"""Every provider there is: `popsd_benchmarks.providers` has what each does."""
