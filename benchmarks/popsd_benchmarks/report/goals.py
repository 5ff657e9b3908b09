"""What is to be reached, as ratios of things measured in one run, and whether it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from popsd_benchmarks.plan import SHAPES
from popsd_benchmarks.providers import FLOOR, OURS
from popsd_benchmarks.results import Cell, Results, select

MIB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SCALED = {"cpu": "cpu", "cuda": "qwen3-1.7b"}
"""The shapes whose sizes the scaling curves vary."""


class Goal(NamedTuple):
    """measure: the figure from one results file, None where it does not have it."""

    device: str
    claim: str
    most: float
    measure: Callable[[Results], float | None]


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


def over(peer: str, results: Results, **case: Any) -> float | None:
    """Our time over another provider's on the same case, round by round."""
    theirs = _cell(results, peer, **case)
    return 1 / theirs.ratios.median if theirs and theirs.ratios else None


def purified_over_two(peer: str, results: Results, **case: Any) -> float | None:
    """Our time with four distributions over the peer's with two, median over median: they are different cases."""
    ours = _cell(results, OURS[case["device"]], loss="purified", **case)
    theirs = _cell(results, peer, loss="two", **case)
    return ours.seconds.median / theirs.seconds.median if ours and theirs and ours.seconds and theirs.seconds else None


def peak_over(peer: str, results: Results, **case: Any) -> float | None:
    ours, theirs = (_cell(results, name, **case) for name in (OURS[case["device"]], peer))
    return ours.peak_mib / theirs.peak_mib if ours and theirs and ours.peak_mib and theirs.peak_mib else None


def workspace_gib(results: Results, **case: Any) -> float | None:
    """Peak memory above inputs and dH."""
    ours = _cell(results, OURS[case["device"]], **case)
    return _beyond_dhidden(ours) / 1024 if ours and ours.peak_mib is not None else None


def workspace_time(provider: str, results: Results, **case: Any) -> float | None:
    """Time with another workspace over that with the default one."""
    theirs = _cell(results, provider, part="planning", **case)
    return theirs.ratios.median if theirs and theirs.ratios else None


def worst_error(kind: str, results: Results, *, device: str, dtype: str) -> float | None:
    """Largest relative error between a true KL of 1e-3 and 2 nats; of the loss from 0.05 on, where it is not tiny."""
    least = 0.05 if kind == "loss" else 1e-3
    ours = select(results.cells, part="accuracy", provider=OURS[device], device=device, dtype=dtype)
    usual = [cell for cell in ours if kind in cell.errors and cell.case.deviation <= 3 and cell.kl is not None]
    return max((cell.errors[kind] for cell in usual if least <= (cell.kl or 0.0) <= 2), default=None)


def error_over_best_peer(results: Results, *, device: str, **case: Any) -> float | None:
    """Our error of dH over the smallest of any peer's, at the divergence where that is worst for us."""
    found, shares = select(results.cells, part="accuracy", device=device, **case), []
    for spread in {cell.case.spread for cell in found}:
        errors = {c.provider: c.errors["dhidden"] for c in select(found, spread=spread) if "dhidden" in c.errors}
        peers = [error for name, error in errors.items() if not name.startswith("popsd")]
        if OURS[device] in errors and peers:
            shares.append(errors[OURS[device]] / min(peers))
    return max(shares, default=None)


def time_growth(part: str, results: Results, **case: Any) -> float | None:
    """Time per unit of the swept dimension, at its largest over at its smallest."""
    curve = [c.seconds.median / getattr(c.case.shape, part) for c in _curve(results, part, **case) if c.seconds]
    return curve[-1] / curve[0] if curve else None


def memory_growth(part: str, results: Results, **case: Any) -> float | None:
    """Peak memory beyond dH, at the largest over at the second largest: below its budget a workspace still grows."""
    curve = [_beyond_dhidden(cell) for cell in _curve(results, part, **case) if cell.peak_mib is not None]
    return curve[-1] / curve[-2] if len(curve) > 1 else None


def step_ratio(results: Results) -> float | None:
    """A training step with the purified target over one with the plain one."""
    return results.found("step", "purified").get("over_opsd")


def _curve(results: Results, part: str, *, device: str, **case: Any) -> list[Cell]:
    """Our points of the full curve at the plan's own sizes, smallest first."""
    found = select(results.cells, part=part, provider=OURS[device], device=device, **case)
    found = [cell for cell in found if cell.case.shape.name == SCALED[device]]
    return sorted(found, key=lambda cell: getattr(cell.case.shape, part)) if len(found) > 3 else []


def _cell(results: Results, provider: str, *, shape: str, part: str = "table", **case: Any) -> Cell | None:
    """The one cell of the part at this shape, with or without the head's padding rows, if it was measured."""
    wanted = replace(SHAPES[shape], used=None)
    found = select(results.cells, part=part, provider=provider, beta=0.5, **case)
    found = [cell for cell in found if cell.status in ("ok", "inaccurate")]
    return next((cell for cell in found if replace(cell.case.shape, used=None) == wanted), None)


def _beyond_dhidden(cell: Cell) -> float:
    assert cell.peak_mib is not None
    shape = cell.case.shape
    return max(cell.peak_mib - shape.tokens * shape.width * ITEM_BYTES[cell.case.dtype] / MIB, 0.0)


def _cpu() -> list[Goal]:
    device: dict[str, Any] = {"device": "cpu"}
    base = device | {"shape": "cpu", "dtype": "float32"}
    ours = base | {"loss": "purified", "trainable_head": False}
    goals = [
        Goal("cpu", "purified, frozen head: time / the four bare matmuls", 1.25, partial(over, FLOOR, **ours)),
        Goal("cpu", "purified, frozen head: time / eager", 0.33, partial(over, "eager", **ours)),
        Goal("cpu", "purified, frozen head: peak memory / eager", 0.125, partial(peak_over, "eager", **ours)),
    ]
    for head, trl, liger in (("frozen", 0.2, 0.42), ("trainable", 1.0, 1.0)):
        two = base | {"loss": "two", "trainable_head": head == "trainable"}
        for peer, name, most in (("TRL", "trl", trl), ("Liger chunked", "liger-chunked", liger)):
            claim = f"two distributions, {head} head: time / {peer}"
            goals.append(Goal("cpu", claim, most, partial(over, name, **two)))
    error = partial(worst_error, "dhidden", dtype="float32", **device)
    goals.append(Goal("cpu", "float32: dH error, KL 1e-3 to 2", 2e-5, error))
    for loss, shown in (("purified", "purified"), ("two", "two distributions")):
        best = partial(error_over_best_peer, loss=loss, dtype="bfloat16", **device)
        goals.append(Goal("cpu", f"{shown}, bfloat16: dH error / best peer's, any KL (2 % is a tie)", 1.02, best))
    return goals + _growth("cpu")


def _gpu() -> list[Goal]:
    found: list[Goal] = []
    bf16: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    for shape, width in (("qwen3-1.7b", 2048), ("qwen3-8b", 4096)):
        base = bf16 | {"shape": shape, "trainable_head": False}
        at = f"purified, frozen head, V = 151,936, D = {width:,}"
        found += [
            Goal("cuda", f"{at}: time / the four bare matmuls", 1.25, partial(over, FLOOR, loss="purified", **base)),
            Goal("cuda", f"{at}: time / TRL with two distributions", 0.5, partial(purified_over_two, "trl", **base)),
            Goal("cuda", f"{at}: time / Liger fused with two", 1.0, partial(purified_over_two, "liger-triton", **base)),
            Goal("cuda", f"{at}: GiB beyond inputs and dH", 2.0, partial(workspace_gib, loss="purified", **base)),
        ]
    for kind, claim, most in (("dhidden", "dH error, KL 1e-3 to 2", 6e-3), ("loss", "loss error, KL 0.05 to 2", 2e-3)):
        found.append(Goal("cuda", f"bfloat16: {claim}", most, partial(worst_error, kind, **bf16)))
    found += _growth("cuda")
    for mib, most in ((1024, 1.15), (400, 1.5)):
        time = partial(workspace_time, f"popsd {mib} MiB", shape="qwen3-1.7b", loss="purified", **bf16)
        found.append(Goal("cuda", f"purified: time at workspace_mib={mib} / at the default", most, time))
    return [*found, Goal("cuda", "training step: purified / standard OPSD", 1.15, step_ratio)]


def _growth(device: str) -> list[Goal]:
    case: dict[str, Any] = {"device": device, "loss": "purified"}
    found = []
    for part, x in (("tokens", "N"), ("vocab", "V")):
        time, memory = (partial(growth, part, **case) for growth in (time_growth, memory_growth))
        claim = f"purified: time per unit of {x}, at the largest {x} over at the smallest"
        found.append(Goal(device, claim, 1.1, time))
        claim = f"purified: memory beyond dH, at the largest {x} over at the second largest"
        found.append(Goal(device, claim, 1.1, memory))
    return found


GOALS = [*_cpu(), *_gpu()]
