"""Results as figures: a provider has one look throughout, popsd is the thick blue line, lines carry their names."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from popsd_benchmarks.providers import FLOOR, OURS
from popsd_benchmarks.report.tables import LOSS_NAMES, cases_of, fixed_sizes, milliseconds, setting, significant
from popsd_benchmarks.results import Case, Cell, Results, select

Draw = Callable[[Path], None]
TITLE_INCHES = 0.4
INK, FAINT = "#333333", "#999999"
CONNECTOR = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
LETTERS = {"tokens": "N, tokens", "vocab": "V, vocabulary", "width": "D, hidden width"}


class Look(NamedTuple):
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
    "trl-port-estimate": Look("#009E73", "--", "port in TRL's way (estimate)"),
    "liger-triton": Look("#CC79A7", "-", "Liger fused"),
    "liger-chunked": Look("#CC79A7", "--", "Liger chunked"),
    "liger-compiled": Look("#CC79A7", ":", "Liger chunked, compiled"),
    "orda": Look("#E69F00", "-", "orda-kernel"),
}


def look(provider: str) -> Look:
    return LOOKS.get(provider, Look(FAINT, "-", provider))


def figures(results: Results) -> dict[str, Draw]:
    """What these results can show: {name: function that draws it to a PNG}. Needs matplotlib only when called."""
    found: dict[str, Draw] = {}
    accuracy = [cell for cell in select(results.cells, part="accuracy") if "dhidden" in cell.errors]
    if len({cell.case.spread for cell in accuracy}) > 1:
        found["accuracy"] = partial(_accuracy, accuracy)
    for loss in LOSS_NAMES:
        curves = {part: _measured(select(results.cells, part=part, loss=loss)) for part in LETTERS}
        curves = {part: cells for part, cells in curves.items() if len({cell.case.shape for cell in cells}) > 1}
        if curves:
            found[f"scaling-{loss}"] = partial(_scaling, curves, results.cells, loss)
        groups: dict[str, list[tuple[Case, list[Cell]]]] = {}
        for case, cells in cases_of(_measured(select(results.cells, part="table", loss=loss))):
            groups.setdefault(_slug(case), []).append((case, cells))
        found |= {f"table-{loss}-{slug}": partial(_bars, cases) for slug, cases in groups.items()}
    return found


def draw(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Writes every figure; returns the paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawing in figures(results).items():
        path = folder / f"{prefix}{name}.png"
        drawing(path)
        paths.append(path)
    return paths


def _measured(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.seconds]


def _slug(case: Case) -> str:
    head = "trainable" if case.trainable_head else "frozen"
    return f"{head}-{case.dtype}" + ("" if case.beta == 0.5 else f"-beta{case.beta:g}")


def _accuracy(cells: Sequence[Cell], path: Path) -> None:
    """A panel per loss and dtype: relative error of dH against the true divergence."""
    panels = [
        (loss, dtype, found)
        for dtype in ("bfloat16", "float32")
        for loss in LOSS_NAMES
        if (found := select(cells, loss=loss, dtype=dtype))
    ]
    figure, axes = _panels(len(panels), min(len(panels), 2), (6.2, 4.0))
    for axis, (loss, dtype, found) in zip(axes, panels, strict=True):
        lines = {
            provider: [
                (c.kl, 100 * c.errors["dhidden"])
                for c in select(found, provider=provider)
                if c.kl and c.errors["dhidden"]
            ]
            for provider in _order(found)
        }
        _curves(axis, lines)
        _plain_ticks(axis.xaxis)
        _plain_ticks(axis.yaxis, " %")
        axis.set_title(f"{LOSS_NAMES[loss]}; {dtype}", fontsize=10, loc="left", color=INK)
        axis.set_xlabel("true KL(target ‖ student), nats per token", fontsize=9)
        axis.set_ylabel("relative error of dH (L2)", fontsize=9)
    _finish(figure, "How wrong is the gradient? Against float64, lower is better", path)


def _scaling(curves: dict[str, list[Cell]], cells: Sequence[Cell], loss: str, path: Path) -> None:
    """Columns: what is swept. Rows: time, memory. Names stand in the last column, elsewhere of whom it does not have."""
    figure, axes = _panels(2 * len(curves), len(curves), (4.6, 3.6))
    rows: tuple[tuple[str, Callable[[Cell], float | None]], ...] = (
        ("time, ms", milliseconds),
        ("peak memory above inputs, MiB", lambda cell: cell.peak_mib),
    )
    last = {cell.provider for cell in list(curves.values())[-1]}
    failures = False
    for column, (part, measured) in enumerate(curves.items()):
        failed = {c.provider for c in select(cells, part=part, loss=loss) if c.status == "out of memory"}
        failures = failures or bool(failed)
        named = None if column == len(curves) - 1 else {cell.provider for cell in measured} - last
        for row, (label, figure_of) in enumerate(rows):
            axis = axes[row * len(curves) + column]
            lines = {
                provider: [
                    (getattr(c.case.shape, part), value)
                    for c in select(measured, provider=provider)
                    if (value := figure_of(c))
                ]
                for provider in _order(measured)
            }
            _curves(axis, lines, failed, named)
            axis.set_ylabel(label, fontsize=9)
            axis.set_xlabel(LETTERS[part], fontsize=9)
            points = sorted({getattr(cell.case.shape, part) for cell in measured})
            axis.set_xticks(points, [f"{point // 1024}k" if point % 1024 == 0 else str(point) for point in points])
            axis.minorticks_off()
            if row == 0:
                axis.set_title(fixed_sizes(measured[0].case, part), fontsize=10, loc="left", color=INK)
    case = next(iter(curves.values()))[0].case
    crosses = "; ✕: out of memory beyond" if failures else ""
    _finish(figure, f"{LOSS_NAMES[loss]}, {setting(case)}: forward and backward{crosses}", path)


def _bars(cases: Sequence[tuple[Case, list[Cell]]], path: Path) -> None:
    """Rows: shapes. Columns: time and memory, the fastest on top, with a line at the bare matmuls."""
    figure, axes = _panels(2 * len(cases), 2, (5.6, 0.0), [0.25 * len(cells) + 0.95 for _, cells in cases])
    for row, (case, cells) in enumerate(cases):
        time_axis, memory_axis = axes[2 * row : 2 * row + 2]
        ranked = sorted(cells, key=milliseconds, reverse=True)
        _bar_panel(time_axis, ranked, [milliseconds(c) for c in ranked], "median time, ms", _times_ours(ranked))
        for cell in select(cells, provider=FLOOR):
            time_axis.axvline(milliseconds(cell), color=INK, linestyle=":", linewidth=1.2)
        shape = case.shape
        size = f"{shape.name}: N = {shape.tokens:,}, V = {shape.vocab:,}, D = {shape.width:,}"
        time_axis.set_title(size, fontsize=10, loc="left", color=INK)
        peaks = [cell.peak_mib or 0.0 for cell in ranked]
        _bar_panel(memory_axis, ranked, peaks, "peak memory above inputs, MiB", [""] * len(ranked))
        memory_axis.set_yticklabels([])
    case = cases[0][0]
    _finish(figure, f"{LOSS_NAMES[case.loss]}, {setting(case)}: forward and backward", path)


def _times_ours(cells: Sequence[Cell]) -> list[str]:
    """What stands beside a time: its ratio to popsd's, and that the answer is wrong where it is."""
    texts = []
    for cell in cells:
        ratio = f"  {cell.ratios.median:.2f}×" if cell.ratios and cell.provider not in OURS.values() else ""
        texts.append(ratio + ("" if cell.status == "ok" else f"  {cell.status}"))
    return texts


def _bar_panel(axis: Any, cells: Sequence[Cell], values: Sequence[float], label: str, beside: Sequence[str]) -> None:
    bars = axis.barh([look(c.provider).label for c in cells], values, height=0.7)
    for bar, cell in zip(bars, cells, strict=True):
        ours = cell.provider in OURS.values()
        bar.set(facecolor=look(cell.provider).colour, alpha=1.0 if ours else 0.3 if cell.provider == FLOOR else 0.55)
        if cell.status != "ok":  # hollow: a figure of something that computes the wrong answer
            bar.set(facecolor="white", edgecolor=look(cell.provider).colour, hatch="////", alpha=0.8)
    texts = [f"{significant(v)}{more}" if v else "" for v, more in zip(values, beside, strict=True)]
    for text, cell in zip(axis.bar_label(bars, texts, padding=3, fontsize=8, color=INK), cells, strict=True):
        text.set_fontweight("bold" if cell.provider in OURS.values() else "normal")
    for tick, cell in zip(axis.get_yticklabels(), cells, strict=True):
        tick.set_fontweight("bold" if cell.provider in OURS.values() else "normal")
    axis.set_xlim(0, 1.35 * max([*values, 1e-9]))
    axis.set_xlabel(label, fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter("{x:,.10g}")


def _order(cells: Sequence[Cell]) -> list[str]:
    """Providers, ours last: drawn on top."""
    names = list(dict.fromkeys(cell.provider for cell in cells))
    return sorted(names, key=lambda name: name in OURS.values())


def _curves(
    axis: Any,
    lines: dict[str, list[tuple[float, float]]],
    failed: Iterable[str] = (),
    named: Iterable[str] | None = None,
) -> None:
    """Log-log lines. failed: those that end in a cross. named: those with their name at the end; None: all."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    ends = []
    for provider, points in lines.items():
        if not points:
            continue
        points = sorted(points)
        colour, line, label = look(provider)
        ours = provider in OURS.values()
        axis.plot(
            *zip(*points, strict=True), color=colour, linestyle=line, linewidth=3.0 if ours else 1.6,
            marker="o", markersize=5 if ours else 3.5,
        )  # fmt: skip
        if provider in failed:
            axis.plot(*points[-1], color=colour, marker="X", markersize=9)
        if named is None or provider in named:
            ends.append((points[-1], label, colour, ours))
    axis.set_ylim(axis.get_ylim()[0] / 1.3, axis.get_ylim()[1])
    _plain_ticks(axis.yaxis)
    _name_ends(axis, ends)


def _plain_ticks(axis: Any, unit: str = "") -> None:
    """1, 2, 5, 10, ..., or powers of ten alone where the range is wide; written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.8f}".rstrip("0").rstrip(".") + unit))


def _name_ends(axis: Any, ends: list[tuple[tuple[float, float], str, str, bool]]) -> None:
    """Names right of the axis, at the height of their line's end or as near as leaves them apart."""
    transform, inverse = axis.transData, axis.transAxes.inverted()
    heights = [float(inverse.transform(transform.transform(point))[1]) for point, *_ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for index, height in zip(order, spread([heights[i] for i in order], 0.062), strict=True):
        point, text, colour, ours = ends[index]
        axis.annotate(
            text, point, xytext=(1.03, height), textcoords="axes fraction", color=colour, fontsize=8.5, va="center",
            fontweight="bold" if ours else "normal", annotation_clip=False,
            arrowprops={**CONNECTOR, "color": colour},
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as keeps neighbours ``gap`` apart and all between 0 and 1: overlapping ones share
    their mean.
    """
    merged: list[tuple[float, int]] = []  # centre, members
    for height in heights:
        merged.append((height, 1))
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            (one, n), (two, m) = merged[-2:]
            merged[-2:] = [((one * n + two * m) / (n + m), n + m)]
    places = [centre + gap * (i - (n - 1) / 2) for centre, n in merged for i in range(n)]
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 - gap * (len(places) - 1 - i))
    for i in range(len(places)):
        places[i] = max(places[i], gap * i)
    return places


def _panels(
    number: int, columns: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    """size: of a panel, in inches; heights: of each row instead."""
    import matplotlib.pyplot as plt

    heights = heights or [size[1]] * -(-number // columns)
    figure, grid = plt.subplots(
        len(heights),
        columns,
        figsize=(size[0] * columns, sum(heights) + TITLE_INCHES),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    axes = list(grid.flat)
    for axis in axes[number:]:
        axis.set_axis_off()
    for axis in axes:
        axis.tick_params(labelsize=8, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:number]


def _finish(figure: Any, title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    width, height = figure.get_size_inches()
    title = textwrap.fill(title, int(10 * width))
    style = {"fontsize": 12, "color": INK, "fontweight": "bold", "ha": "left", "va": "top"}
    figure.suptitle(title, x=0.1 / width, y=1 - 0.1 / height, **style)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
