"""What is to be reached, as ratios of things measured in one run, and whether it was."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from popsd_benchmarks.cells import Cell, select
from popsd_benchmarks.providers import FLOOR, OURS
from popsd_benchmarks.shapes import SHAPES

MIB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SCALED = {"cpu": "cpu", "cuda": "qwen3-1.7b"}
"""The shapes whose sizes the scaling curves vary."""
Measure = Callable[[Sequence[Cell]], float | None]


class Target(NamedTuple):
    """measure: the figure from the cells of one results file, None where they do not have it."""

    device: str
    claim: str
    most: float
    measure: Measure


class Verdict(NamedTuple):
    target: Target
    value: float | None

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.target.most else "missed"


def judge(device: str, cells: Sequence[Cell]) -> list[Verdict]:
    """Every target of a device beside what these cells say."""
    return [Verdict(target, target.measure(cells)) for target in TARGETS if target.device == device]


def over_floor(device: str, **case: Any) -> Measure:
    """Our time over that of the bare products, round by round."""

    def measure(cells: Sequence[Cell]) -> float | None:
        floor = _cell(cells, FLOOR, device=device, **case)
        return None if floor is None or not floor.ratios else 1 / statistics.median(floor.ratios)

    return measure


def over_peer(device: str, peer: str, **case: Any) -> Measure:
    """Our time over the peer's on the same case, round by round."""

    def measure(cells: Sequence[Cell]) -> float | None:
        theirs = _cell(cells, peer, device=device, **case)
        return None if theirs is None or not theirs.ratios else 1 / statistics.median(theirs.ratios)

    return measure


def purified_over_two(device: str, peer: str, **case: Any) -> Measure:
    """Our time with four distributions over the peer's with two, median over median: they are different cases."""

    def measure(cells: Sequence[Cell]) -> float | None:
        ours = _cell(cells, OURS[device], device=device, loss="purified", **case)
        theirs = _cell(cells, peer, device=device, loss="two", **case)
        if ours is None or theirs is None or not ours.seconds or not theirs.seconds:
            return None
        return statistics.median(ours.seconds) / statistics.median(theirs.seconds)

    return measure


def peak_over_peer(device: str, peer: str, **case: Any) -> Measure:
    def measure(cells: Sequence[Cell]) -> float | None:
        ours, theirs = (_cell(cells, name, device=device, **case) for name in (OURS[device], peer))
        if ours is None or theirs is None or ours.peak_mib is None or theirs.peak_mib is None:
            return None
        return ours.peak_mib / theirs.peak_mib

    return measure


def workspace_gib(device: str, **case: Any) -> Measure:
    """Peak memory above inputs and dH."""

    def measure(cells: Sequence[Cell]) -> float | None:
        ours = _cell(cells, OURS[device], device=device, **case)
        return None if ours is None or ours.peak_mib is None else _beyond_dhidden(ours) / 1024

    return measure


def worst_error(device: str, kind: str, **case: Any) -> Measure:
    """Largest relative error between a true KL of 1e-3 and 2 nats; of the loss from 0.05 on, where it is not tiny."""

    def measure(cells: Sequence[Cell]) -> float | None:
        least = 0.05 if kind == "loss" else 1e-3
        ours = select(cells, part="accuracy", provider=OURS[device], device=device, **case)
        errors = [c.errors[kind] for c in ours if kind in c.errors and c.kl is not None and least <= c.kl <= 2]
        return max(errors, default=None)

    return measure


def error_over_best_peer(device: str, **case: Any) -> Measure:
    """Our error of dH over the smallest of any peer's, at the divergence where that is worst for us."""

    def measure(cells: Sequence[Cell]) -> float | None:
        found = select(cells, part="accuracy", device=device, **case)
        shares = []
        for spread in {cell.case.spread for cell in found}:
            errors = {c.provider: c.errors["dhidden"] for c in select(found, spread=spread) if "dhidden" in c.errors}
            peers = [error for name, error in errors.items() if not name.startswith("popsd")]
            if OURS[device] in errors and peers:
                shares.append(errors[OURS[device]] / min(peers))
        return max(shares, default=None)

    return measure


def time_growth(device: str, part: str, **case: Any) -> Measure:
    """Time per unit of the swept dimension, at its largest over at its smallest."""

    def measure(cells: Sequence[Cell]) -> float | None:
        curve = [cell for cell in _curve(cells, device, part, case) if cell.seconds]
        if not curve:
            return None
        first, last = (statistics.median(c.seconds) / getattr(c.case.shape, part) for c in (curve[0], curve[-1]))
        return last / first

    return measure


def memory_growth(device: str, part: str, **case: Any) -> Measure:
    """Peak memory beyond dH, at the largest over at the second largest: below its budget a workspace still grows."""

    def measure(cells: Sequence[Cell]) -> float | None:
        curve = [cell for cell in _curve(cells, device, part, case) if cell.peak_mib is not None]
        return _beyond_dhidden(curve[-1]) / _beyond_dhidden(curve[-2]) if len(curve) > 1 else None

    return measure


def never(cells: Sequence[Cell]) -> float | None:
    """Of a target that no part measures yet."""
    return None


def _curve(cells: Sequence[Cell], device: str, part: str, case: dict[str, Any]) -> list[Cell]:
    """Our points of the full curve at the plan's own sizes, smallest first."""
    found = select(cells, part=part, provider=OURS[device], device=device, **case)
    found = [cell for cell in found if cell.case.shape.name == SCALED[device]]
    return sorted(found, key=lambda cell: getattr(cell.case.shape, part)) if len(found) > 3 else []


def _cell(cells: Sequence[Cell], provider: str, *, shape: str, **case: Any) -> Cell | None:
    """The one cell of the main table at exactly this shape, if it was measured."""
    found = select(cells, part="table", provider=provider, shape=SHAPES[shape], beta=0.5, **case)
    return next((cell for cell in found if cell.status in ("ok", "inaccurate")), None)


def _beyond_dhidden(cell: Cell) -> float:
    assert cell.peak_mib is not None
    shape = cell.case.shape
    return max(cell.peak_mib - shape.tokens * shape.width * ITEM_BYTES[cell.case.dtype] / MIB, 0.0)


def _cpu() -> list[Target]:
    base = {"shape": "cpu", "dtype": "float32"}
    purified = {**base, "loss": "purified", "trainable_head": False}
    frozen, trained = ({**base, "loss": "two", "trainable_head": head} for head in (False, True))
    entries: list[tuple[str, float, Measure]] = [
        ("purified, frozen head: time / the four bare products", 1.25, over_floor("cpu", **purified)),
        ("purified, frozen head: time / eager", 0.33, over_peer("cpu", "eager", **purified)),
        ("purified, frozen head: peak memory / eager", 0.125, peak_over_peer("cpu", "eager", **purified)),
        ("two distributions, frozen head: time / TRL", 0.2, over_peer("cpu", "trl", **frozen)),
        ("two distributions, frozen head: time / Liger chunked", 0.42, over_peer("cpu", "liger-chunked", **frozen)),
        ("two distributions, trainable head: time / TRL", 1.0, over_peer("cpu", "trl", **trained)),
        ("two distributions, trainable head: time / Liger chunked", 1.0, over_peer("cpu", "liger-chunked", **trained)),
        ("float32: dH error, KL 1e-3 to 2", 2e-5, worst_error("cpu", "dhidden", dtype="float32")),
    ]
    for loss, name in (("purified", "purified"), ("two", "two distributions")):
        best = error_over_best_peer("cpu", loss=loss, dtype="bfloat16")
        entries.append((f"{name}, bfloat16: dH error / best peer's, any KL (2 % is a tie)", 1.02, best))
    return [*(Target("cpu", *entry) for entry in entries), *_growth("cpu")]


def _gpu() -> list[Target]:
    found = []
    for shape, width in (("qwen3-1.7b", 2048), ("qwen3-8b", 4096)):
        base = {"shape": shape, "dtype": "bfloat16", "trainable_head": False}
        purified = {**base, "loss": "purified"}
        at = f"purified, frozen head, V = 151,936, D = {width:,}"
        found += [
            Target("cuda", f"{at}: time / the four bare products", 1.25, over_floor("cuda", **purified)),
            Target("cuda", f"{at}: time / TRL with two distributions", 0.5, purified_over_two("cuda", "trl", **base)),
            Target(
                "cuda", f"{at}: time / Liger fused with two", 1.0, purified_over_two("cuda", "liger-triton", **base)
            ),
            Target("cuda", f"{at}: GiB beyond inputs and dH", 2.0, workspace_gib("cuda", **purified)),
        ]
    return [
        *found,
        Target("cuda", "bfloat16: dH error, KL 1e-3 to 2", 6e-3, worst_error("cuda", "dhidden", dtype="bfloat16")),
        Target("cuda", "bfloat16: loss error, KL 0.05 to 2", 2e-3, worst_error("cuda", "loss", dtype="bfloat16")),
        *_growth("cuda"),
        Target("cuda", "purified: time at workspace_mib=1024 / at the default", 1.15, never),
        Target("cuda", "purified: time at workspace_mib=400 / at the default", 1.5, never),
        Target("cuda", "training step: purified / standard OPSD", 1.15, never),
    ]


def _growth(device: str) -> list[Target]:
    return [
        target
        for part, letter in (("tokens", "N"), ("vocab", "V"))
        for target in (
            Target(device, f"purified: time per unit of {letter}, at the largest {letter} over at the smallest", 1.1,
                   time_growth(device, part, loss="purified")),
            Target(device, f"purified: memory beyond dH, at the largest {letter} over at the second largest", 1.1,
                   memory_growth(device, part, loss="purified")),
        )
    ]  # fmt: skip


TARGETS = [*_cpu(), *_gpu()]
