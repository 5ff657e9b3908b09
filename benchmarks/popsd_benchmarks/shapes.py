"""Heads of real models, and their small versions for a CPU: an eighth of the vocabulary, the width and the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from popsd_benchmarks.cells import Shape

_REAL = (
    Shape(name="qwen3-1.7b", tokens=8192, vocab=151936, used=151669, width=2048),
    Shape(name="qwen3-8b", tokens=8192, vocab=151936, used=151669, width=4096),
    Shape(name="qwen3-4b", tokens=8192, vocab=151936, used=151669, width=2560),
    Shape(name="llama-3-8b", tokens=8192, vocab=128256, width=4096),
    Shape(name="gemma-2-2b", tokens=8192, vocab=256000, width=2304, softcap=30.0),
    Shape(name="gemma-2-9b", tokens=8192, vocab=256000, width=3584, softcap=30.0),
)


def _small(shape: Shape) -> Shape:
    used = None if shape.used is None else shape.used // 8
    return replace(
        shape,
        name=f"{shape.name}-small",
        tokens=shape.tokens // 8,
        vocab=shape.vocab // 8,
        width=shape.width // 8,
        used=used,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        *_REAL,
        *map(_small, _REAL),
        Shape(name="cpu", tokens=512, vocab=32768, width=512),
        Shape(name="tiny", tokens=48, vocab=1537, width=32),
    )
}


def find(names: Sequence[str]) -> list[Shape]:
    """The shapes of these names. Raises ValueError for an unknown one, naming those that exist."""
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"shapes: expected some of {', '.join(SHAPES)}; got {', '.join(unknown)}.")
    return [SHAPES[name] for name in names]
