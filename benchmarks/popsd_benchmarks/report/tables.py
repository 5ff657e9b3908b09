"""Cells as tables: a table per case for the terminal and for Markdown, and one row per cell as CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popsd_benchmarks.providers import FLOOR, OURS
from popsd_benchmarks.results import Case, Cell, select

Rows = list[list[str]]
LOSS_NAMES = {"purified": "purified loss, four distributions", "two": "generalised JSD, two distributions"}
SWEPT = {"tokens": "N", "vocab": "V", "width": "D"}
"""Parts that sweep one dimension of the shape, and its letter."""


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
    """The floor first, then by time. The ratio is to popsd's time, round by round: its median and quartiles."""
    ours = OURS.get(case.device, "popsd-torch")
    measured = sorted((c for c in cells if c.seconds), key=lambda c: (c.provider != FLOOR, milliseconds(c)))
    weight_error = any("dweight" in cell.errors for cell in measured)
    header = ["provider", "ms", f"time / {ours} (quartiles)", "share of floor", "TFLOP/s", "peak MiB"]
    rows = [[*header, "loss error", "dH error", *["dW error"] * weight_error]]
    for cell in measured:
        errors = ["loss", "dhidden", *["dweight"] * weight_error]
        rows.append(
            [
                f"{cell.provider} (floor)" if cell.provider == FLOOR else cell.provider,
                _time(cell),
                _ratio(cell),
                _optional(cell.floor_share, "{:.0%}"),
                _optional(cell.tflops, "{:.3g}"),
                _optional(cell.peak_mib, "{:,.0f}"),
                *(_optional(cell.errors.get(name), "{:.1e}") for name in errors),
            ]
        )
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


def curve_table(cells: Sequence[Cell], part: str, value: str) -> Rows:
    """Providers against the swept dimension. value: "ms" or "MiB"."""
    points = sorted({getattr(cell.case.shape, part) for cell in cells})
    rows = [[f"{value} at {SWEPT[part]} =", *(f"{point:,}" for point in points)]]
    for provider in dict.fromkeys(cell.provider for cell in cells):
        found = {getattr(c.case.shape, part): c for c in cells if c.provider == provider}
        if any(cell.seconds for cell in found.values()):
            rows.append([provider, *(_curve_entry(found.get(point), value) for point in points)])
    return rows


def accuracy_table(cells: Sequence[Cell]) -> Rows:
    """Relative L2 error of dH: providers against the true divergence."""
    spreads = sorted({cell.case.spread for cell in cells})
    divergences = [next((c.kl for c in cells if c.case.spread == s and c.kl is not None), None) for s in spreads]
    rows = [["dH error at KL =", *(_optional(kl, "{:.1e}") for kl in divergences)]]
    for provider in dict.fromkeys(cell.provider for cell in cells if cell.errors):
        found = {c.case.spread: c.errors.get("dhidden") for c in cells if c.provider == provider}
        rows.append([provider, *(_optional(found.get(spread), "{:.1e}") for spread in spreads)])
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
    for (case, _), group in _grouped(select(cells, part="accuracy")):
        what = "error of dH against float64 by true KL(target ‖ student) in nats"
        title = f"{LOSS_NAMES[case.loss]}, {case.dtype}: {what}"
        found.append(Table(title, accuracy_table(group), [], _absent(group)))
    for part in SWEPT:
        for (case, fixed), group in _grouped(select(cells, part=part), part):
            title = f"{LOSS_NAMES[case.loss]}, {setting(case)}, against {SWEPT[part]} ({fixed})"
            found.append(Table(f"{title}: time", curve_table(group, part, "ms"), [], _absent(group)))
            found.append(Table(f"{title}: peak memory above inputs", curve_table(group, part, "MiB"), [], []))
    for cell in select(cells, part="profile"):
        if cell.kernels:
            found.append(Table(f"Profile of {cell.provider}, {case_title(cell.case)}", kernel_table(cell), [], []))
    return found


def fixed_sizes(case: Case, part: str) -> str:
    """What a sweep leaves alone."""
    return ", ".join(f"{letter} = {getattr(case.shape, name):,}" for name, letter in SWEPT.items() if name != part)


def _grouped(cells: Sequence[Cell], part: str | None = None) -> list[tuple[tuple[Case, str], list[Cell]]]:
    """By loss, setting and what is fixed, with one case for all of them."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        fixed = cell.case.shape.name if part is None else fixed_sizes(cell.case, part)
        groups.setdefault((cell.case.loss, setting(cell.case), fixed), []).append(cell)
    return [((group[0].case, key[-1]), group) for key, group in groups.items()]


def _notes(cells: Sequence[Cell]) -> list[str]:
    """Each remark once, with whom it concerns."""
    remarks: dict[str, list[str]] = {}
    for cell in cells:
        for remark in filter(None, cell.note.split("; ")):
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
    rows = [{name: _no_formula(value) for name, value in _flat(cell).items()} for cell in cells]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["part"])
        writer.writeheader()
        writer.writerows(rows)


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def milliseconds(cell: Cell) -> float:
    """Of the median round."""
    assert cell.seconds is not None
    return 1e3 * cell.seconds.median


def significant(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time(cell: Cell) -> str:
    return significant(milliseconds(cell)) + ("" if cell.status == "ok" else f" ({cell.status})")


def _ratio(cell: Cell) -> str:
    if cell.ratios is None:
        return "–"
    spread = f" ({cell.ratios.low:.2f}–{cell.ratios.high:.2f})"
    return f"{cell.ratios.median:.2f}" + ("" if cell.provider in OURS.values() else spread)


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _curve_entry(cell: Cell | None, value: str) -> str:
    if cell is None:
        return "–"
    if not cell.seconds:
        return cell.status
    if value == "MiB":
        return _optional(cell.peak_mib, "{:,.0f}")
    return _time(cell)


def _flat(cell: Cell) -> dict[str, Any]:
    case, shape = vars(cell.case).copy(), vars(cell.case.shape).copy()
    row = {"part": cell.part, "provider": cell.provider} | case | {"shape": shape.pop("name")} | shape
    row |= {"status": cell.status, "note": cell.note, "rounds": cell.seconds.count if cell.seconds else 0}
    for name, rounds in (("seconds", cell.seconds), ("ratio", cell.ratios)):
        for figure, attribute in (("median", "median"), ("quartile_1", "low"), ("quartile_3", "high")):
            row[f"{name}_{figure}"] = getattr(rounds, attribute, None)
    row |= {name: getattr(cell, name) for name in ("floor_share", "tflops", "peak_mib")}
    return row | {f"error_{name}": cell.errors.get(name) for name in ("loss", "dhidden", "dweight")} | {"kl": cell.kl}
