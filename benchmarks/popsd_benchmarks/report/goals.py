"""What is to be reached, as ratios of things measured in one run, and whether it was."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from popsd_benchmarks.cases import FLOOR, OURS, SHAPES
from popsd_benchmarks.results import Cell, Results, ratio, select

MIB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SCALED = {"cpu": "cpu", "cuda": "qwen3-1.7b"}
"""The shapes whose sizes the scaling curves vary."""


class Verdict(NamedTuple):
    """value: what one results file says, None where it does not have the figure. most: the largest that is good enough."""

    claim: str
    most: float
    value: float | None

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.most else "missed"


def judge(device: str, results: Results) -> list[Verdict]:
    """Every goal of a device beside what these results say."""
    return list((_cpu if device == "cpu" else _gpu)(results))


def _cpu(results: Results) -> Iterator[Verdict]:
    def cell(provider: str, loss: str = "purified", trainable: bool = False) -> Cell | None:
        return _cell(results, provider, "cpu", loss=loss, dtype="float32", trainable_head=trainable, device="cpu")

    ours, eager = cell(OURS["cpu"]), cell("eager")
    yield Verdict("purified, frozen head: time / the four bare matmuls", 1.25, ratio(ours, cell(FLOOR)))
    yield Verdict("purified, frozen head: time / eager", 0.33, ratio(ours, eager))
    memory = ours.peak_mib / eager.peak_mib if ours and eager and ours.peak_mib and eager.peak_mib else None
    yield Verdict("purified, frozen head: peak memory / eager", 0.125, memory)
    for head, trl, liger in (("frozen", 0.2, 0.42), ("trainable", 1.0, 1.0)):
        for peer, name, most in (("TRL", "trl", trl), ("Liger chunked", "liger-chunked", liger)):
            value = ratio(*(cell(x, "two", head == "trainable") for x in (OURS["cpu"], name)))
            yield Verdict(f"two distributions, {head} head: time / {peer}", most, value)
    yield Verdict("float32: dH error, KL 1e-3 to 2", 2e-5, _worst_error(results, "dhidden", "cpu", "float32"))
    for loss, shown in (("purified", "purified"), ("two", "two distributions")):
        claim = f"{shown}, bfloat16: dH error / best peer's, any KL (2 % is a tie)"
        yield Verdict(claim, 1.02, _error_over_best_peer(results, loss=loss, dtype="bfloat16", device="cpu"))
    yield from _growth(results, "cpu")


def _gpu(results: Results) -> Iterator[Verdict]:
    bf16: dict[str, Any] = {"dtype": "bfloat16", "trainable_head": False, "device": "cuda"}
    for shape, width in (("qwen3-1.7b", 2048), ("qwen3-8b", 4096)):
        at = f"purified, frozen head, V = 151,936, D = {width:,}"
        floor, ours = (_cell(results, name, shape, loss="purified", **bf16) for name in (FLOOR, OURS["cuda"]))
        yield Verdict(f"{at}: time / the four bare matmuls", 1.25, ratio(ours, floor))
        for peer, name, most in (("TRL with", "trl", 0.5), ("Liger fused with", "liger-triton", 1.0)):
            value = ratio(ours, _cell(results, name, shape, loss="two", **bf16))
            yield Verdict(f"{at}: time / {peer} two{' distributions' if name == 'trl' else ''}", most, value)
        beyond = _beyond_dhidden(ours)
        yield Verdict(f"{at}: GiB beyond inputs and dH", 2.0, None if beyond is None else beyond / 1024)
    for kind, claim, most in (("dhidden", "dH error, KL 1e-3 to 2", 6e-3), ("loss", "loss error, KL 0.05 to 2", 2e-3)):
        yield Verdict(f"bfloat16: {claim}", most, _worst_error(results, kind, "cuda", "bfloat16"))
    yield from _growth(results, "cuda")
    for mib, most in ((1024, 1.15), (400, 1.5)):
        names = (f"popsd {mib} MiB", OURS["cuda"])
        cells = (_cell(results, name, "qwen3-1.7b", part="planning", loss="purified", **bf16) for name in names)
        yield Verdict(f"purified: time at workspace_mib={mib} / at the default", most, ratio(*cells))
    over = results.found("step", "purified").get("over_opsd")
    yield Verdict("training step: purified / standard OPSD", 1.15, over)


def _growth(results: Results, device: str) -> Iterator[Verdict]:
    """Of the full curves at the plan's own sizes. Memory below its budget grows anyway, so it has to stay at the end."""
    for part, x in (("tokens", "N"), ("vocab", "V")):
        curve = select(results.cells, part=part, provider=OURS[device], device=device, loss="purified")
        curve = [cell for cell in curve if cell.case.shape.name == SCALED[device]]
        curve = sorted(curve, key=lambda cell: getattr(cell.case.shape, part)) if len(curve) > 3 else []
        times = [cell.seconds.median / getattr(cell.case.shape, part) for cell in curve if cell.seconds]
        peaks = [beyond for cell in curve if (beyond := _beyond_dhidden(cell)) is not None]
        claim = f"purified: time per unit of {x}, at the largest {x} over at the smallest"
        yield Verdict(claim, 1.1, times[-1] / times[0] if times else None)
        claim = f"purified: memory beyond dH, at the largest {x} over at the second largest"
        yield Verdict(claim, 1.1, peaks[-1] / peaks[-2] if len(peaks) > 1 else None)


def _cell(results: Results, provider: str, shape: str, part: str = "table", **case: Any) -> Cell | None:
    """The one cell of the part at this shape, with or without the head's padding rows, if it was measured."""
    wanted = replace(SHAPES[shape], used=None)
    found = select(results.cells, part=part, provider=provider, beta=0.5, **case)
    found = [cell for cell in found if cell.status in ("ok", "inaccurate")]
    return next((cell for cell in found if replace(cell.case.shape, used=None) == wanted), None)


def _beyond_dhidden(cell: Cell | None) -> float | None:
    """MiB above inputs and dH at the peak."""
    if cell is None or cell.peak_mib is None:
        return None
    shape = cell.case.shape
    return max(cell.peak_mib - shape.tokens * shape.width * ITEM_BYTES[cell.case.dtype] / MIB, 0.0)


def _worst_error(results: Results, kind: str, device: str, dtype: str) -> float | None:
    """Largest relative error between a true KL of 1e-3 and 2 nats; of the loss from 0.05 on, where it is not tiny."""
    least = 0.05 if kind == "loss" else 1e-3
    ours = select(results.cells, part="accuracy", provider=OURS[device], device=device, dtype=dtype)
    usual = [cell for cell in ours if kind in cell.errors and cell.case.deviation <= 3 and cell.kl is not None]
    return max((cell.errors[kind] for cell in usual if least <= (cell.kl or 0.0) <= 2), default=None)


def _error_over_best_peer(results: Results, **case: Any) -> float | None:
    """Our error of dH over the smallest of any peer's, at the divergence where that is worst for us."""
    found, shares = select(results.cells, part="accuracy", **case), []
    for spread in {cell.case.spread for cell in found}:
        errors = {c.provider: c.errors["dhidden"] for c in select(found, spread=spread) if "dhidden" in c.errors}
        peers = [error for name, error in errors.items() if not name.startswith("popsd")]
        if OURS[case["device"]] in errors and peers:
            shares.append(errors[OURS[case["device"]]] / min(peers))
    return max(shares, default=None)
