"""Cells as tables: a table per case for the terminal and for Markdown, and one row per cell as CSV."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from popsd_benchmarks.cases import FLOOR, OURS, Case
from popsd_benchmarks.results import Cell, named, ratio, select

T = TypeVar("T")
Of = Callable[[Cell], T]
Rows = list[list[str]]
LOSS_NAMES = {"purified": "purified loss, four distributions", "two": "generalised JSD, two distributions"}
SWEPT = {"tokens": "N", "vocab": "V", "width": "D"}
"""Parts that sweep one dimension of the shape, and its letter."""
DISTURBED = 0.05
"""Share of the device that others may have before it is said."""


class Table(NamedTuple):
    """notes: what a reader of the rows must know. absent: who was not measured here, and why."""

    title: str
    rows: Rows
    notes: list[str]
    absent: list[str]


def cases_of(cells: Iterable[Cell]) -> list[tuple[Case, list[Cell]]]:
    """Cells by case, in the order measured."""
    grouped: dict[Case, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.case, []).append(cell)
    return list(grouped.items())


def case_table(case: Case, cells: Sequence[Cell]) -> Table:
    """The floor first, then by time, with its quartiles. The ratio is that of the medians beside it."""
    name = OURS.get(case.device, "popsd-torch")
    ours, floor = named(cells, name), named(cells, FLOOR)
    measured = sorted((c for c in cells if c.seconds), key=lambda c: (c.provider != FLOOR, milliseconds(c)))
    errors = {"loss": "loss", "dhidden": "dH", "dweight": "dW"}
    if not any("dweight" in cell.errors for cell in measured):
        del errors["dweight"]
    header = ["provider", "ms (quartiles)", f"time / {name}", "share of floor", "TFLOP/s", "peak MiB"]
    rows = [[*header, *(f"{letters} error" for letters in errors.values())]]
    for cell in measured:
        name = f"{cell.provider} (floor)" if cell.provider == FLOOR else cell.provider
        shares = [_optional(ratio(floor, cell), "{:.0%}"), _optional(cell.tflops, "{:.3g}"), _peak(cell)]
        wrong = [_optional(cell.errors.get(name), "{:.1e}") for name in errors]
        rows.append([name, _time(cell, quartiles=True), _optional(ratio(cell, ours), "{:.2f}"), *shares, *wrong])
    return Table(case_title(case), rows, _notes(measured), _absent(cells))


def case_title(case: Case) -> str:
    shape = case.shape
    used = "" if shape.used is None else f" ({shape.used:,} used)"
    cap = "" if shape.softcap is None else f", soft cap {shape.softcap:g}"
    sizes = f"N = {shape.tokens:,}, V = {shape.vocab:,}{used}, D = {shape.width:,}{cap}"
    return f"{LOSS_NAMES[case.loss]}, {setting(case)}: {shape.name}, {sizes}"


def setting(case: Case) -> str:
    """The case without its loss and shape."""
    head = "trainable" if case.trainable_head else "frozen"
    deviation = "" if case.deviation == 2.0 else f", logit deviation {case.deviation:g}"
    return f"{head} head, {case.dtype}" + ("" if case.beta == 0.5 else f", beta {case.beta:g}") + deviation


def curve_table(corner: str, points: dict[Any, str], cells: Sequence[Cell], x: Of[Any], entry: Of[str]) -> Rows:
    """A row per provider that was measured, a column per value of ``x`` and its text; a dash where it has no cell."""
    rows = [[corner, *(points[point] for point in sorted(points))]]
    for provider in dict.fromkeys(cell.provider for cell in cells if cell.seconds or cell.errors):
        found = {x(cell): entry(cell) for cell in cells if cell.provider == provider}
        rows.append([provider, *(found.get(point, "–") for point in sorted(points))])
    return rows


def kernel_table(cell: Cell) -> Rows:
    """The kernels, or on a CPU the operations, of one step."""
    rows = [["kernel", "ms", "calls", "share of the step", "GB/s", "share of a copy's"]]
    for row in cell.kernels:
        rates = [_optional(row.get("gb_per_s"), "{:,.0f}"), _optional(row.get("bandwidth_share"), "{:.0%}")]
        rows.append([row["name"], significant(1e3 * row["seconds"]), str(row["calls"]), f"{row['share']:.0%}", *rates])
    return rows


def all_tables(cells: Sequence[Cell]) -> list[Table]:
    """Every part that was measured: cases, accuracy curves, scaling curves, profiles."""
    found = [case_table(case, group) for case, group in cases_of(select(cells, part="table"))]
    for case, _, group in _curves(select(cells, part="accuracy"), lambda case: case.shape.name):
        what = "error of dH against float64 by true KL(target ‖ student) in nats"
        kls = {cell.case.spread: f"{cell.kl:.1e}" for cell in reversed(group) if cell.kl is not None}
        rows = curve_table("dH error at KL =", kls, group, attrgetter("case.spread"), _error)
        found.append(Table(f"{LOSS_NAMES[case.loss]}, {case.dtype}: {what}", rows, [], _absent(group)))
    for part, letter in SWEPT.items():
        size: Of[int] = attrgetter(f"case.shape.{part}")
        for case, fixed, group in _curves(select(cells, part=part), partial(fixed_sizes, part=part)):
            title = f"{LOSS_NAMES[case.loss]}, {setting(case)}, against {letter} ({fixed})"
            sizes = {size(cell): f"{size(cell):,}" for cell in group}
            times = curve_table(f"ms at {letter} =", sizes, group, size, _time)
            peaks = curve_table(f"MiB at {letter} =", sizes, group, size, _peak)
            found.append(Table(f"{title}: time", times, [], _absent(group)))
            found.append(Table(f"{title}: peak memory above inputs", peaks, [], []))
    for cell in select(cells, part="profile"):
        if cell.kernels:
            found.append(Table(f"Profile of {cell.provider}, {case_title(cell.case)}", kernel_table(cell), [], []))
    return found


def fixed_sizes(case: Case, part: str) -> str:
    """What a sweep leaves alone."""
    return ", ".join(f"{letter} = {getattr(case.shape, name):,}" for name, letter in SWEPT.items() if name != part)


def _curves(cells: Sequence[Cell], fixed: Callable[[Case], str]) -> list[tuple[Case, str, list[Cell]]]:
    """By loss, setting and what is fixed, with one case for all of them."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.case.loss, setting(cell.case), fixed(cell.case)), []).append(cell)
    return [(group[0].case, key[-1], group) for key, group in groups.items()]


def disturbance(cells: Iterable[Cell]) -> str:
    """What is to be said of other processes, or nothing."""
    share, device = max(((cell.others or 0.0, cell.case.device) for cell in cells), default=(0.0, ""))
    what = "had {:.0%} of the processors" if device == "cpu" else "held {:.0%} of the GPU's memory"
    return f"other processes {what.format(share)} meanwhile" if share > DISTURBED else ""


def machine(meta: dict[str, Any]) -> str:
    """Where it was measured, in a line."""
    threads = f", {meta['threads']} thread{'s' if meta['threads'] > 1 else ''}" if "threads" in meta else ""
    return f"{meta['device']}{threads}"


def _notes(cells: Sequence[Cell]) -> list[str]:
    """Each remark once, with whom it concerns."""
    remarks: dict[str, list[str]] = {}
    for cell in cells:
        for remark in filter(None, [*cell.note.split("; "), disturbance([cell])]):
            remarks.setdefault(remark, []).append(cell.provider)
    return [f"{'all' if len(names) == len(cells) else ', '.join(names)}: {text}" for text, names in remarks.items()]


def _absent(cells: Sequence[Cell]) -> list[str]:
    """Who has no figure at all, by reason."""
    present = {cell.provider for cell in cells if cell.seconds or cell.errors}
    reasons: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.provider not in present and cell.provider != FLOOR:
            reason = f"{cell.status} ({cell.note})" if cell.note else cell.status
            reasons.setdefault(reason, {})[cell.provider] = None
    return [f"{reason}: {', '.join(providers)}" for reason, providers in reasons.items()]


def as_text(rows: Rows) -> str:
    """Aligned, the first column to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_markdown(rows: Rows, left: int = 1) -> str:
    """``left``: how many columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(rows[0]))]
    escaped = [[re.sub(r"([|<]|(?<!\*)\*(?!\*))", r"\\\1", text) for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def write_csv(cells: Iterable[Cell], path: Path) -> None:
    """One row per cell; times in seconds, memory in MiB. Text that a spreadsheet would run as a formula begins with '."""
    rows = [dict(_flat(asdict(cell) | {"kernels": len(cell.kernels)})) for cell in cells]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}_")
        elif value is not None:
            formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
            yield f"{prefix}{name}", f"'{value}" if formula else value


def milliseconds(cell: Cell) -> float:
    """Of the median round."""
    assert cell.seconds is not None
    return 1e3 * cell.seconds.median


def significant(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def versions(meta: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in meta["versions"].items())


def _time(cell: Cell, quartiles: bool = False) -> str:
    if cell.seconds is None:
        return cell.status
    spread = "–".join(significant(1e3 * x) for x in (cell.seconds.low, cell.seconds.high))
    shown = significant(milliseconds(cell)) + (f" ({spread})" if quartiles else "")
    return shown + ("" if cell.status == "ok" else f", {cell.status}" if quartiles else f" ({cell.status})")


def _peak(cell: Cell) -> str:
    return _optional(cell.peak_mib, "{:,.0f}") if cell.seconds else cell.status


def _error(cell: Cell) -> str:
    return _optional(cell.errors.get("dhidden"), "{:.1e}")


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
