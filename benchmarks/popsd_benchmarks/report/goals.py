"""What is to be reached, as ratios of things measured in one run, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from popsd_benchmarks.plan import SHAPES
from popsd_benchmarks.providers import FLOOR, OURS
from popsd_benchmarks.results import Cell, Results, select

MIB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SCALED = {"cpu": "cpu", "cuda": "qwen3-1.7b"}
"""The shapes whose sizes the scaling curves vary."""
Measure = Callable[[Results], float | None]


class Goal(NamedTuple):
    """measure: the figure from one results file, None where it does not have it."""

    device: str
    claim: str
    most: float
    measure: Measure


class Verdict(NamedTuple):
    goal: Goal
    value: float | None

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.goal.most else "missed"


def judge(device: str, results: Results) -> list[Verdict]:
    """Every goal of a device beside what these results say."""
    return [Verdict(goal, goal.measure(results)) for goal in GOALS if goal.device == device]


def over(peer: str, **case: Any) -> Measure:
    """Our time over another provider's on the same case, round by round."""

    def measure(results: Results) -> float | None:
        theirs = _cell(results, peer, **case)
        return None if theirs is None or not theirs.ratios else 1 / theirs.ratios.median

    return measure


def purified_over_two(peer: str, *, device: str, **case: Any) -> Measure:
    """Our time with four distributions over the peer's with two, median over median: they are different cases."""

    def measure(results: Results) -> float | None:
        ours = _cell(results, OURS[device], device=device, loss="purified", **case)
        theirs = _cell(results, peer, device=device, loss="two", **case)
        if ours is None or theirs is None or not ours.seconds or not theirs.seconds:
            return None
        return ours.seconds.median / theirs.seconds.median

    return measure


def peak_over(peer: str, *, device: str, **case: Any) -> Measure:
    def measure(results: Results) -> float | None:
        ours, theirs = (_cell(results, name, device=device, **case) for name in (OURS[device], peer))
        if ours is None or theirs is None or ours.peak_mib is None or theirs.peak_mib is None:
            return None
        return ours.peak_mib / theirs.peak_mib

    return measure


def workspace_gib(*, device: str, **case: Any) -> Measure:
    """Peak memory above inputs and dH."""

    def measure(results: Results) -> float | None:
        ours = _cell(results, OURS[device], device=device, **case)
        return None if ours is None or ours.peak_mib is None else _beyond_dhidden(ours) / 1024

    return measure


def workspace_time(provider: str, **case: Any) -> Measure:
    """Time with another workspace over that with the default one."""

    def measure(results: Results) -> float | None:
        theirs = _cell(results, provider, part="planning", **case)
        return None if theirs is None or not theirs.ratios else theirs.ratios.median

    return measure


def worst_error(kind: str, *, device: str, **case: Any) -> Measure:
    """Largest relative error between a true KL of 1e-3 and 2 nats; of the loss from 0.05 on, where it is not tiny."""

    def measure(results: Results) -> float | None:
        least = 0.05 if kind == "loss" else 1e-3
        ours = select(results.cells, part="accuracy", provider=OURS[device], device=device, **case)
        ours = [cell for cell in ours if kind in cell.errors and cell.case.deviation <= 3]
        errors = [cell.errors[kind] for cell in ours if cell.kl is not None and least <= cell.kl <= 2]
        return max(errors, default=None)

    return measure


def error_over_best_peer(*, device: str, **case: Any) -> Measure:
    """Our error of dH over the smallest of any peer's, at the divergence where that is worst for us."""

    def measure(results: Results) -> float | None:
        found = select(results.cells, part="accuracy", device=device, **case)
        shares = []
        for spread in {cell.case.spread for cell in found}:
            errors = {c.provider: c.errors["dhidden"] for c in select(found, spread=spread) if "dhidden" in c.errors}
            peers = [error for name, error in errors.items() if not name.startswith("popsd")]
            if OURS[device] in errors and peers:
                shares.append(errors[OURS[device]] / min(peers))
        return max(shares, default=None)

    return measure


def time_growth(part: str, **case: Any) -> Measure:
    """Time per unit of the swept dimension, at its largest over at its smallest."""

    def measure(results: Results) -> float | None:
        curve = [(c.seconds.median, getattr(c.case.shape, part)) for c in _curve(results, part, **case) if c.seconds]
        return curve[-1][0] / curve[-1][1] / (curve[0][0] / curve[0][1]) if curve else None

    return measure


def memory_growth(part: str, **case: Any) -> Measure:
    """Peak memory beyond dH, at the largest over at the second largest: below its budget a workspace still grows."""

    def measure(results: Results) -> float | None:
        curve = [cell for cell in _curve(results, part, **case) if cell.peak_mib is not None]
        return _beyond_dhidden(curve[-1]) / _beyond_dhidden(curve[-2]) if len(curve) > 1 else None

    return measure


def step_ratio(results: Results) -> float | None:
    """A training step with the purified target over one with the plain one."""
    found = [row for row in results.records if (row["part"], row["name"]) == ("step", "purified")]
    return found[0].get("over_opsd") if found else None


def _curve(results: Results, part: str, *, device: str, **case: Any) -> list[Cell]:
    """Our points of the full curve at the plan's own sizes, smallest first."""
    found = select(results.cells, part=part, provider=OURS[device], device=device, **case)
    found = [cell for cell in found if cell.case.shape.name == SCALED[device]]
    return sorted(found, key=lambda cell: getattr(cell.case.shape, part)) if len(found) > 3 else []


def _cell(results: Results, provider: str, *, shape: str, part: str = "table", **case: Any) -> Cell | None:
    """The one cell of the part at this shape, with or without the head's padding rows, if it was measured."""
    wanted = replace(SHAPES[shape], used=None)
    for cell in select(results.cells, part=part, provider=provider, beta=0.5, **case):
        if replace(cell.case.shape, used=None) == wanted and cell.status in ("ok", "inaccurate"):
            return cell
    return None


def _beyond_dhidden(cell: Cell) -> float:
    assert cell.peak_mib is not None
    shape = cell.case.shape
    return max(cell.peak_mib - shape.tokens * shape.width * ITEM_BYTES[cell.case.dtype] / MIB, 0.0)


def _cpu() -> list[tuple[str, float, Measure]]:
    base: dict[str, Any] = {"device": "cpu", "shape": "cpu", "dtype": "float32"}
    purified = {**base, "loss": "purified", "trainable_head": False}
    frozen, trained = ({**base, "loss": "two", "trainable_head": head} for head in (False, True))
    best = {loss: error_over_best_peer(device="cpu", loss=loss, dtype="bfloat16") for loss in ("purified", "two")}
    return [
        ("purified, frozen head: time / the four bare matmuls", 1.25, over(FLOOR, **purified)),
        ("purified, frozen head: time / eager", 0.33, over("eager", **purified)),
        ("purified, frozen head: peak memory / eager", 0.125, peak_over("eager", **purified)),
        ("two distributions, frozen head: time / TRL", 0.2, over("trl", **frozen)),
        ("two distributions, frozen head: time / Liger chunked", 0.42, over("liger-chunked", **frozen)),
        ("two distributions, trainable head: time / TRL", 1.0, over("trl", **trained)),
        ("two distributions, trainable head: time / Liger chunked", 1.0, over("liger-chunked", **trained)),
        ("float32: dH error, KL 1e-3 to 2", 2e-5, worst_error("dhidden", device="cpu", dtype="float32")),
        ("purified, bfloat16: dH error / best peer's, any KL (2 % is a tie)", 1.02, best["purified"]),
        ("two distributions, bfloat16: dH error / best peer's, any KL (2 % is a tie)", 1.02, best["two"]),
        *_growth("cpu"),
    ]


def _gpu() -> list[tuple[str, float, Measure]]:
    found: list[tuple[str, float, Measure]] = []
    for shape, width in (("qwen3-1.7b", 2048), ("qwen3-8b", 4096)):
        base: dict[str, Any] = {"device": "cuda", "shape": shape, "dtype": "bfloat16", "trainable_head": False}
        at = f"purified, frozen head, V = 151,936, D = {width:,}"
        found += [
            (f"{at}: time / the four bare matmuls", 1.25, over(FLOOR, **base, loss="purified")),
            (f"{at}: time / TRL with two distributions", 0.5, purified_over_two("trl", **base)),
            (f"{at}: time / Liger fused with two", 1.0, purified_over_two("liger-triton", **base)),
            (f"{at}: GiB beyond inputs and dH", 2.0, workspace_gib(**base, loss="purified")),
        ]
    bf16: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    main = {**bf16, "shape": "qwen3-1.7b", "loss": "purified"}
    return [
        *found,
        ("bfloat16: dH error, KL 1e-3 to 2", 6e-3, worst_error("dhidden", **bf16)),
        ("bfloat16: loss error, KL 0.05 to 2", 2e-3, worst_error("loss", **bf16)),
        *_growth("cuda"),
        ("purified: time at workspace_mib=1024 / at the default", 1.15, workspace_time("popsd 1024 MiB", **main)),
        ("purified: time at workspace_mib=400 / at the default", 1.5, workspace_time("popsd 400 MiB", **main)),
        ("training step: purified / standard OPSD", 1.15, step_ratio),
    ]


def _growth(device: str) -> list[tuple[str, float, Measure]]:
    case = {"device": device, "loss": "purified"}
    return [
        entry
        for part, letter in (("tokens", "N"), ("vocab", "V"))
        for entry in (
            (f"purified: time per unit of {letter}, at the largest {letter} over at the smallest", 1.1,
             time_growth(part, **case)),
            (f"purified: memory beyond dH, at the largest {letter} over at the second largest", 1.1,
             memory_growth(part, **case)),
        )
    ]  # fmt: skip


GOALS = [*(Goal("cpu", *entry) for entry in _cpu()), *(Goal("cuda", *entry) for entry in _gpu())]
