"""Results as figures: a provider has one look throughout, and popsd is the thick blue line."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from popsd_benchmarks.cases import FLOOR, LOOKS, OURS, Case, Look
from popsd_benchmarks.report import tables
from popsd_benchmarks.report.tables import LOSS_NAMES, Of, cases_of, fixed_sizes, milliseconds, setting, significant
from popsd_benchmarks.results import Cell, Results, named, ratio, select

Drawn = tuple[Any, Sequence[Any], str, Sequence[Cell]]
"""A figure, those of its axes that share a legend, its title, and whose figures it shows."""

_PEAK = attrgetter("peak_mib")
INK, FAINT = "#333333", "#999999"
LETTERS = {"tokens": "N, tokens", "vocab": "V, vocabulary", "width": "D, hidden width"}
STYLE = {
    "axes.labelsize": 9, "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": INK,
    "axes.titlelocation": "left", "axes.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False,
    "legend.handlelength": 3, "savefig.dpi": 110, "xtick.color": INK, "xtick.labelsize": 8, "ytick.color": INK,
    "ytick.labelsize": 8,
}  # fmt: skip


def look(provider: str) -> Look:
    return LOOKS.get(provider, Look(FAINT, "-", provider))


def figures(results: Results) -> dict[str, Callable[[], Drawn]]:
    """What these results can show: {name: function that draws it}. Needs matplotlib only when called."""
    found: dict[str, Callable[[], Drawn]] = {}
    accuracy = [cell for cell in select(results.cells, part="accuracy") if "dhidden" in cell.errors]
    if len({cell.case.spread for cell in accuracy}) > 1:
        found["accuracy"] = partial(_accuracy, accuracy)
    timed = [cell for cell in results.cells if cell.seconds]
    for loss in LOSS_NAMES:
        curves = {part: select(timed, part=part, loss=loss) for part in LETTERS}
        curves = {part: cells for part, cells in curves.items() if len({cell.case.shape for cell in cells}) > 1}
        if curves:
            found[f"scaling-{loss}"] = partial(_scaling, curves, loss)
        groups: dict[str, list[tuple[Case, list[Cell]]]] = {}
        for case, cells in cases_of(select(timed, part="table", loss=loss)):
            slug = f"{'trainable' if case.trainable_head else 'frozen'}-{case.dtype}"
            groups.setdefault(slug + ("" if case.beta == 0.5 else f"-beta{case.beta:g}"), []).append((case, cells))
        found |= {f"table-{loss}-{slug}": partial(_bars, cases) for slug, cases in groups.items()}
    return found


def draw(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Writes every figure to a PNG, with its machine below; returns the paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / f"{prefix}{name}.png": drawing for name, drawing in figures(results).items()}
    with matplotlib.rc_context(STYLE):
        for path, drawing in paths.items():
            _finish(*drawing(), results.meta, path)
    return list(paths)


def _accuracy(cells: Sequence[Cell]) -> Drawn:
    """A panel per loss and dtype: relative error of dH against the true divergence."""
    drawn = {(cell.case.dtype, cell.case.loss) for cell in cells}
    panels = [(loss, dtype) for dtype, loss in sorted(drawn)]  # which is also the order of the names
    figure, axes = _panels(rows := -(-len(panels) // 2), min(len(panels), 2), 5.2, [3.9] * rows)
    for axis, (loss, dtype) in zip(axes, panels, strict=False):
        found = [c for c in select(cells, loss=loss, dtype=dtype) if c.kl and c.errors["dhidden"]]
        _curves(axis, found, lambda cell: cell.kl, lambda cell: 100 * cell.errors["dhidden"])
        _plain_ticks(axis.xaxis)
        _plain_ticks(axis.yaxis, " %")
        axis.set(title=f"{LOSS_NAMES[loss]}; {dtype}", ylabel="error of dH (L2)")
        axis.set_xlabel("true KL(target ‖ student), nats per token")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure, axes, "How wrong is the gradient? Against float64, lower is better", cells


def _scaling(curves: dict[str, list[Cell]], loss: str) -> Drawn:
    """Columns: what is swept. Rows: time, memory."""
    figure, axes = _panels(2, len(curves), 3.9, [3.4] * 2)
    rows: dict[str, Of[float | None]] = {"time, ms": milliseconds, "peak memory above inputs, MiB": _PEAK}
    for column, (part, measured) in enumerate(curves.items()):
        points = sorted({getattr(cell.case.shape, part) for cell in measured})
        for row, (label, figure_of) in enumerate(rows.items()):
            axis = axes[row * len(curves) + column]
            shown = [cell for cell in measured if figure_of(cell)]
            _curves(axis, shown, attrgetter(f"case.shape.{part}"), figure_of)
            title = "" if row else fixed_sizes(measured[0].case, part)
            axis.set(title=title, xlabel=LETTERS[part], ylabel=label)
            axis.set_xticks(points, [f"{point // 1024}k" if point % 1024 == 0 else str(point) for point in points])
            axis.minorticks_off()
            _plain_ticks(axis.yaxis)
    drawn = [cell for cells in curves.values() for cell in cells]
    return figure, axes, f"{LOSS_NAMES[loss]}, {setting(drawn[0].case)}: forward and backward", drawn


def _bars(cases: Sequence[tuple[Case, list[Cell]]]) -> Drawn:
    """Rows: shapes. Columns: time, with its ratio to popsd's, and memory, the fastest on top; hatched: a wrong answer."""
    figure, axes = _panels(len(cases), 2, 5.6, [0.25 * len(cells) + 0.95 for _, cells in cases])
    for row, (case, cells) in enumerate(cases):
        ranked, shape = sorted(cells, key=milliseconds, reverse=True), case.shape
        size = f"{shape.name}: N = {shape.tokens:,}, V = {shape.vocab:,}, D = {shape.width:,}"
        ours = named(cells, OURS[case.device])
        ratios = ["" if c is ours or ours is None else f"  {ratio(c, ours):.2f}×" for c in ranked]
        marks = ["" if cell.status == "ok" else f"  {cell.status}" for cell in ranked]
        times = [f"{significant(milliseconds(c))}{a}{b}" for c, a, b in zip(ranked, ratios, marks, strict=True)]
        peaks = [f"{significant(cell.peak_mib)}" if cell.peak_mib else "" for cell in ranked]
        _bar_panel(axes[2 * row], ranked, list(map(milliseconds, ranked)), times, _whiskers(ranked))
        _bar_panel(axes[2 * row + 1], ranked, [cell.peak_mib or 0.0 for cell in ranked], peaks)
        for cell in select(ranked, provider=FLOOR):
            axes[2 * row].axvline(milliseconds(cell), color=INK, linestyle=":", linewidth=1.2)
        axes[2 * row].set(title=size, xlabel="median time, ms")
        axes[2 * row + 1].set(xlabel="peak memory above inputs, MiB", yticklabels=[])
    title = f"{LOSS_NAMES[cases[0][0].loss]}, {setting(cases[0][0])}: forward and backward"
    return figure, [], title, [cell for _, cells in cases for cell in cells]


def _whiskers(cells: Sequence[Cell]) -> list[list[float]]:
    """How far the quartiles lie below and above the median time, in ms."""
    times = [cell.seconds for cell in cells if cell.seconds]
    return [[1e3 * (x.median - x.low) for x in times], [1e3 * (x.high - x.median) for x in times]]


def _bar_panel(
    axis: Any, cells: Sequence[Cell], values: Sequence[float], texts: Sequence[str], spread: Any = None
) -> None:
    names, lines = [look(c.provider).label for c in cells], {"elinewidth": 1.0, "capsize": 2.0, "ecolor": INK}
    bars = axis.barh(names, values, height=0.7, xerr=spread, error_kw=lines)
    labels = axis.bar_label(bars, texts, padding=3, fontsize=8, color=INK)
    for bar, cell, label, tick in zip(bars, cells, labels, axis.get_yticklabels(), strict=True):
        ours, colour = cell.provider in OURS.values(), look(cell.provider).colour
        bar.set(facecolor=colour, alpha=1.0 if ours else 0.3 if cell.provider == FLOOR else 0.55)
        if cell.status != "ok":
            bar.set(facecolor="white", edgecolor=colour, hatch="////", alpha=0.8)
        for text in (label, tick):
            text.set_fontweight("bold" if ours else "normal")
    axis.set_xlim(0, 1.35 * max([*values, 1e-9]))
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter("{x:,.10g}")


def _curves(axis: Any, cells: Sequence[Cell], x: Of[Any], y: Of[float | None]) -> None:
    """A log-log line per provider, ours last and so on top."""
    axis.set(xscale="log", yscale="log")
    names = dict.fromkeys(cell.provider for cell in cells)
    for name in sorted(names, key=lambda name: name in OURS.values()):
        points = sorted(select(cells, provider=name), key=x)
        (colour, line, label), ours = look(name), name in OURS.values()
        width, size = (3.0, 5.0) if ours else (1.6, 3.5)
        style = {"color": colour, "linestyle": line, "linewidth": width, "marker": "o", "markersize": size}
        spread = _whiskers(points) if y is milliseconds else None
        axis.errorbar(
            [*map(x, points)], [*map(y, points)], yerr=spread, label=label, capsize=2.0, elinewidth=1.0, **style
        )


def _plain_ticks(axis: Any, unit: str = "") -> None:
    """1, 2, 5, 10, ..., or powers of ten alone where the range is wide; written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.8f}".rstrip("0").rstrip(".") + unit))


def _panels(rows: int, columns: int, width: float, heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """width: of a panel, heights: of each row of them, in inches."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, sum(heights) + 0.4), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    return figure, list(grid.flat)


def _finish(
    figure: Any, axes: Sequence[Any], title: str, cells: Sequence[Cell], meta: dict[str, Any], path: Path
) -> None:
    """With one legend beside all of the axes, and below them where, how often and beside what it was measured."""
    import matplotlib.pyplot as plt

    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        names = sorted(handles, key=lambda name: name != "popsd")
        figure.legend([handles[name] for name in names], names, loc="outside right upper")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
    counts = sorted({cell.seconds.count for cell in cells if cell.seconds})
    often = "–".join(map(str, [*counts[:1], *counts[1:][-1:]]))
    rounds = f"medians of {often} rounds, whiskers from quartile to quartile" if counts else ""
    where = f"{tables.machine(meta)}, {meta['date'][:10]}; commit {meta['commit']}, {tables.versions(meta)}"
    text = "; ".join(filter(None, [where, rounds, tables.disturbance(cells)]))
    wrapped = textwrap.fill(text, int(18 * figure.get_figwidth()))
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=7, color=INK)
    figure.savefig(path)
    plt.close(figure)
