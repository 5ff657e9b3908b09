"""The plots of a diagnosis, and the one scale by which tokens are coloured. Importing this needs no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popsd_integrations.diagnose.summary import CONTEXTS, Diagnosis
from popsd_integrations.estimates import Interval
from popsd_integrations.plotting import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    LINE,
    TEXT,
    VERMILLION,
    figure,
    legend,
    rgb,
    save,
    style,
)

UP, DOWN = rgb(BLUE), rgb(VERMILLION)
FULL_COLOUR = 0.5
"""The change of a token's probability from which on its colour is the full one. Larger changes are rare."""
SCALE = (-0.5, -0.3, -0.1, -0.02, 0.0, 0.02, 0.1, 0.3, 0.5)
_COLUMNS, _TOKENS = 16, 256


def changed(row: dict[str, Any]) -> float:
    """How much probability the sampled token would gain under the target, in [-1, 1]."""
    return float(row["target/token"] - row["base/token"])


def colour(change: float) -> tuple[int, int, int]:
    """White at no change, and the root of a change in between, so that one of 0.02 can be seen."""
    strength = min(abs(change) / FULL_COLOUR, 1.0) ** 0.5 * 0.75
    red, green, blue = (round(255 + strength * (full - 255)) for full in (UP if change > 0 else DOWN))
    return red, green, blue


def curves(diagnosis: Diagnosis, path: Path) -> Path:
    """Means over the places in a completion, with bands, and how many completions reach a place."""
    drawn, axes = figure(2, 3, panel=(4.4, 3.0))
    points = diagnosis.positions
    panels = (
        ("‖Δ_ref‖ / ‖Δ_total‖", {"reference_fraction": "raw", "weighted_reference_fraction": "weighted by π_θ"}),
        ("cosine with Δ_total", {"cos_total_reference": "Δ_ref", "cos_total_transferable": "Δ_it"}),
        ("share of probability mass moved", {"mass_moved": "target against base"}),
    )
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for dashes, (name, label) in zip(("-", "--"), lines.items(), strict=False):
            _line(axis, points, name, dashes, COLOURS["target"], label)
        style(axis, title, "completion token")
    for context in CONTEXTS:
        _line(axes[3], points, f"{context}/markers", "-", COLOURS[context], context)
    style(axes[3], "probability of the markers", "completion token")
    _line(axes[4], points, "change", "-", COLOURS["target"], "target / base")
    margin = diagnosis.config["margin"]
    axes[4].axhspan(1 - margin, 1 + margin, color=GREY, alpha=0.2, lw=0, label="counts as no change")
    axes[4].set_ylim(0, min(3.0, axes[4].get_ylim()[1]))
    style(axes[4], "the markers' change", "completion token")
    for axis in axes[:5]:
        legend(axis)
    places = [point["position"] for point in points]
    width = 0.9 * (places[1] - places[0] if len(places) > 1 else 1.0)
    axes[5].bar(places, [point["completions"] for point in points], width, color=GREY)
    for place, point in zip(places, points, strict=True):
        axes[5].text(
            place, point["completions"], str(point["tokens"]), ha="center", va="bottom", fontsize=TEXT - 3, rotation=90
        )
    style(axes[5], "completions that reach a place (above: tokens)", "completion token")
    drawn.text(0.01, 0.005, "Bands: 95 %, over completions, each place by itself.", fontsize=TEXT)
    return save(drawn, path)


def _line(axis: Any, points: Sequence[dict[str, Any]], name: str, dashes: str, color: str, label: str) -> None:
    there = [point for point in points if point[name] is not None]
    places, found = [point["position"] for point in there], [Interval(*point[name]) for point in there]
    axis.plot(places, [x.mean for x in found], dashes, color=color, label=label, **LINE)
    band = [(place, x) for place, x in zip(places, found, strict=True) if x.low is not None]
    if band:
        axis.fill_between(
            [place for place, _ in band],
            [x.low for _, x in band],
            [x.high for _, x in band],
            color=color,
            alpha=0.15,
            lw=0,
        )


def heatmap(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """One completion, a cell per token, and below it what the colours mean."""
    rows = rows[:_TOKENS]
    lines = -(-len(rows) // _COLUMNS)
    drawn, (axis,) = figure(1, 1, size=(12, 0.42 * (lines + 2) + 0.8))
    for place, row in enumerate(rows):
        line, column = divmod(place, _COLUMNS)
        text = repr(row["text"])[1:-1].strip() or "·"
        _cell(axis, line, column, changed(row), text if len(text) <= 10 else text[:9] + "…")
    for column, change in enumerate(SCALE):
        _cell(axis, lines + 0.6, column, change, f"{change:+.2f}" if change else "0")
    axis.text(len(SCALE) + 0.2, lines + 1.1, "P(token) under the target − under the base", va="center", fontsize=TEXT)
    axis.set_xlim(0, _COLUMNS)
    axis.set_ylim(lines + 1.7, 0)
    axis.set_axis_off()
    title = f"Completion {rows[0]['completion']}: blue tokens gain probability under the target, orange ones lose"
    axis.set_title(title, fontsize=10, loc="left")
    return save(drawn, path)


def _cell(axis: Any, line: float, column: int, change: float, text: str) -> None:
    axis.broken_barh([(column, 1)], (line, 1), color=tuple(x / 255 for x in colour(change)), linewidth=0)
    text = text.replace("$", r"\$")
    axis.text(column + 0.5, line + 0.5, text, ha="center", va="center", fontsize=TEXT, color=BLACK)
