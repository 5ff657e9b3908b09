"""The shapes, and which cases each part measures: the most telling first, and how much effort each is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from popsd_benchmarks.measure import JUDGED_ROWS, WHOLE_TILES, Effort
from popsd_benchmarks.results import Case, Loss, Shape

PARTS = ("table", "accuracy", "tokens", "vocab", "width", "profile")
LOSSES: tuple[Loss, ...] = ("purified", "two")
_REAL = (
    Shape(name="qwen3-1.7b", tokens=8192, vocab=151936, used=151669, width=2048),
    Shape(name="qwen3-8b", tokens=8192, vocab=151936, used=151669, width=4096),
    Shape(name="qwen3-4b", tokens=8192, vocab=151936, used=151669, width=2560),
    Shape(name="llama-3-8b", tokens=8192, vocab=128256, width=4096),
    Shape(name="gemma-2-2b", tokens=8192, vocab=256000, width=2304, softcap=30.0),
    Shape(name="gemma-2-9b", tokens=8192, vocab=256000, width=3584, softcap=30.0),
)


def _divided(shape: Shape, name: str, by: int) -> Shape:
    used = shape.used and shape.used // by
    sizes = {size: getattr(shape, size) // by for size in ("tokens", "vocab", "width")}
    return replace(shape, name=name, used=used, **sizes)


CPU_SHAPE = Shape(name="cpu", tokens=512, vocab=32768, width=512)
SHAPES = {
    shape.name: shape
    for shape in (
        *_REAL,
        *(_divided(shape, f"{shape.name}-small", 8) for shape in _REAL),
        CPU_SHAPE,
        Shape(name="tiny", tokens=48, vocab=1537, width=32),
    )
}
"""Heads of real models, their small versions for a CPU (an eighth of every size), and two shapes of our own."""
GPU_TABLE = ("qwen3-1.7b", "qwen3-8b", "gemma-2-2b", "llama-3-8b", "qwen3-4b")
SPREADS = (0.003, 0.008, 0.02, 0.05, 0.12, 0.3, 0.7, 1.6)
"""KL(target ‖ student) from about 1e-4 to 3 nats."""
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "tokens": (256, 1024, 4096, 16384),
        "vocab": (8192, 32768, 131072, 262144),
        "width": (128, 512, 2048),
    },
    "cuda": {
        "tokens": (256, 1024, 4096, 16384, 65536),
        "vocab": (32768, 65536, 131072, 262144),
        "width": (1024, 2048, 4096, 8192),
    },
}
"""Of the scaling curves."""


@dataclass(frozen=True)
class Item:
    part: str
    case: Case
    effort: Effort


def find(names: Sequence[str]) -> list[Shape]:
    """The shapes of these names. Raises ValueError for an unknown one, naming those that exist."""
    if unknown := [name for name in names if name not in SHAPES]:
        raise ValueError(f"shapes: expected some of {', '.join(SHAPES)}; got {', '.join(unknown)}.")
    return [SHAPES[name] for name in names]


def cases(part: str, shapes: Sequence[Shape] | None, *, quick: bool, device: str) -> Iterator[Item]:
    """The cases of a part. Raises ValueError for an unknown one."""
    if part not in PARTS:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}; got {part}.")
    if part in SIZES["cpu"]:
        yield from _scaling(part, shapes, quick, device)
    else:
        yield from {"table": _table, "accuracy": _accuracy, "profile": _profile}[part](shapes, quick, device)


def _table(shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    """On a GPU the most telling case comes first, and compiled providers, half a minute a case, run only there."""
    rounds = 3 if quick else 9 if device == "cpu" else 12
    effort = Effort(rounds=rounds, seconds=10 if quick else 60, compilers=not quick)
    if device == "cpu":
        for shape in shapes or [_cpu_shape(quick)]:
            for dtype in ("float32",) if quick else ("float32", "bfloat16"):
                for trainable in (False,) if quick else (False, True):
                    for loss in LOSSES:
                        yield Item("table", Case(loss=loss, shape=shape, trainable_head=trainable, dtype=dtype), effort)
        return
    effort = replace(effort, seconds=8, judged_rows=JUDGED_ROWS)
    plain = replace(effort, compilers=False)
    case = Case(loss="purified", shape=CPU_SHAPE, dtype="bfloat16", device=device)
    chosen = list(shapes or find(GPU_TABLE))
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
    cpu = device == "cpu"
    effort = Effort(rounds=0, peak=False, gate=False, compilers=not quick and cpu, judged_rows=JUDGED_ROWS)
    for shape in shapes or [_cpu_shape(quick) if quick or cpu else SHAPES["qwen3-1.7b"]]:
        small = replace(shape, tokens=min(shape.tokens, JUDGED_ROWS if cpu else WHOLE_TILES))
        for dtype in ("bfloat16", "float32"):
            for loss in LOSSES:
                for spread in SPREADS[::3] if quick else SPREADS:
                    case = Case(loss=loss, shape=small, dtype=dtype, device=device, spread=spread)
                    yield Item("accuracy", case, effort)


def _scaling(part: str, shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    """One size at a time, the others the shape's; a frozen head. Compiled providers would compile anew for every size."""
    cpu = device == "cpu"
    usual = replace(CPU_SHAPE, tokens=256, vocab=8192, width=256) if cpu else SHAPES["qwen3-1.7b"]
    effort = Effort(rounds=3, seconds=5 if quick else 20, compilers=False, judged_rows=JUDGED_ROWS)
    for shape in shapes or [usual]:
        whole = replace(shape, used=None) if part == "vocab" else shape
        for loss in LOSSES:
            for value in SIZES[device][part][: 3 if quick else None]:
                size = replace(whole, **{part: value})  # type: ignore[arg-type]
                dtype = "float32" if cpu else "bfloat16"
                yield Item(part, Case(loss=loss, shape=size, dtype=dtype, device=device), effort)


def _profile(shapes: Sequence[Shape] | None, quick: bool, device: str) -> Iterator[Item]:
    effort = Effort(rounds=1 if quick else 3, peak=False, compilers=not quick)
    dtype = "float32" if device == "cpu" else "bfloat16"
    for shape in shapes or [SHAPES["cpu" if device == "cpu" else "qwen3-1.7b"]]:
        for loss in LOSSES:
            yield Item("profile", Case(loss=loss, shape=shape, dtype=dtype, device=device), effort)


def _cpu_shape(quick: bool) -> Shape:
    return _divided(CPU_SHAPE, "cpu", 2) if quick else CPU_SHAPE
