"""Which cases each part measures, the most telling first, and how much effort each is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from popsd_benchmarks.cells import Case, Loss, Shape
from popsd_benchmarks.measure import JUDGED_ROWS, WHOLE_TILES, Effort
from popsd_benchmarks.shapes import SHAPES

PARTS = ("table", "accuracy", "tokens", "vocab", "width", "profile")
LOSSES: tuple[Loss, ...] = ("purified", "two")
GPU_TABLE = ("qwen3-1.7b", "qwen3-8b", "gemma-2-2b", "llama-3-8b", "qwen3-4b")
SPREADS = (0.003, 0.008, 0.02, 0.05, 0.12, 0.3, 0.7, 1.6)
"""KL(target ‖ student) from about 1e-4 to 3 nats."""
TOKENS: dict[str, tuple[int, ...]] = {"cpu": (256, 1024, 4096, 16384), "cuda": (256, 1024, 4096, 16384, 65536)}
VOCAB: dict[str, tuple[int, ...]] = {"cpu": (8192, 32768, 131072, 262144), "cuda": (32768, 65536, 131072, 262144)}
WIDTH: dict[str, tuple[int, ...]] = {"cpu": (128, 512, 2048), "cuda": (1024, 2048, 4096, 8192)}


@dataclass(frozen=True)
class Item:
    part: str
    case: Case
    effort: Effort


def cases(part: str, shapes: Sequence[Shape] | None, *, quick: bool, device: str) -> Iterator[Item]:
    """The cases of a part. Raises ValueError for an unknown one."""
    if part not in PARTS:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}; got {part}.")
    makers = {"table": _table, "accuracy": _accuracy, "profile": _profile}
    if part in makers:
        yield from makers[part](shapes, quick, device)
    else:
        yield from _scaling(part, shapes, quick, device)


def _table(shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    """On a GPU the most telling first, and what compiles, half a minute a case, only there."""
    effort = Effort(
        rounds=3 if quick else 9 if device == "cpu" else 12, seconds=10 if quick else 60, compilers=not quick
    )
    if device == "cpu":
        dtypes = ("float32",) if quick else ("float32", "bfloat16")
        for shape in shapes or [_quick(SHAPES["cpu"]) if quick else SHAPES["cpu"]]:
            for dtype in dtypes:
                for trainable in (False,) if quick else (False, True):
                    for loss in LOSSES:
                        yield Item("table", Case(loss=loss, shape=shape, trainable_head=trainable, dtype=dtype), effort)
        return
    effort = replace(effort, seconds=8, judged_rows=JUDGED_ROWS)
    plain = replace(effort, compilers=False)
    case = Case(loss="purified", shape=SHAPES["cpu"], dtype="bfloat16", device=device)
    chosen = list(shapes or [SHAPES[name] for name in GPU_TABLE])
    main, rest = (chosen, []) if shapes else (chosen[:2], chosen[2:])
    variants = [(replace(case, shape=shape), effort) for shape in main]
    if not quick:
        variants += [(replace(case, shape=shape, beta=0.0), plain) for shape in main]
        variants += [(replace(case, shape=shape, trainable_head=True), plain) for shape in main]
        variants += [(replace(case, shape=replace(main[0], tokens=tokens)), plain) for tokens in (1024, 32768)]
        variants += [(replace(case, shape=shape), plain) for shape in rest]
    for variant, cost in variants:
        for loss in LOSSES:
            yield Item("table", replace(variant, loss=loss), cost)


def _accuracy(shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    effort = Effort(rounds=0, peak=False, gate=False, compilers=not quick and device == "cpu", judged_rows=JUDGED_ROWS)
    most = JUDGED_ROWS if device == "cpu" else WHOLE_TILES
    default = _quick(SHAPES["cpu"]) if quick else SHAPES["cpu"] if device == "cpu" else SHAPES["qwen3-1.7b"]
    for shape in shapes or [default]:
        for dtype in ("bfloat16", "float32"):
            for loss in LOSSES:
                for spread in SPREADS[::3] if quick else SPREADS:
                    small = replace(shape, tokens=min(shape.tokens, most))
                    yield Item(
                        "accuracy", Case(loss=loss, shape=small, dtype=dtype, device=device, spread=spread), effort
                    )


def _scaling(part: str, shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    """One size at a time on log axes, the others the shape's; a frozen head. Without what compiles, anew for every size."""
    values = {"tokens": TOKENS, "vocab": VOCAB, "width": WIDTH}[part][device]
    cpu = device == "cpu"
    base = replace(SHAPES["cpu"], tokens=256, vocab=8192, width=256) if cpu else SHAPES["qwen3-1.7b"]
    effort = Effort(rounds=3, seconds=5 if quick else 20, compilers=False, judged_rows=JUDGED_ROWS)
    dtype = "float32" if cpu else "bfloat16"
    for shape in shapes or [base]:
        for loss in LOSSES:
            for value in values[:3] if quick else values:
                changed: dict[str, Any] = {part: value, "used": None if part == "vocab" else shape.used}
                size = replace(shape, **changed)
                yield Item(part, Case(loss=loss, shape=size, dtype=dtype, device=device), effort)


def _profile(shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    effort = Effort(rounds=1 if quick else 3, peak=False, compilers=not quick)
    dtype = "float32" if device == "cpu" else "bfloat16"
    for shape in shapes or [SHAPES["cpu" if device == "cpu" else "qwen3-1.7b"]]:
        for loss in LOSSES:
            yield Item("profile", Case(loss=loss, shape=shape, dtype=dtype, device=device), effort)


def _quick(shape: Shape) -> Shape:
    return replace(shape, tokens=shape.tokens // 2, vocab=shape.vocab // 2, width=shape.width // 2)
