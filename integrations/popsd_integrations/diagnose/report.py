"""A diagnosis as files: JSON, CSV, plots, and a page with completions coloured by what the target would change."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popsd_integrations.diagnose.measure import CONTEXTS, Diagnosis
from popsd_integrations.plotting import (
    BLUE,
    COLOURS,
    LINE,
    TEXT,
    VERMILLION,
    data_uri,
    figure,
    legend,
    rgb,
    save,
    style,
)

UP, DOWN = rgb(BLUE), rgb(VERMILLION)
HEAT_COLUMNS, HEAT_TOKENS = 16, 256
SHOWN_IN_HTML = 4


def write(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Write diagnosis.json, tokens.csv, report.html and, where matplotlib is there, curves.png and heatmap.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "diagnosis.json", folder / "tokens.csv"]
    content = {
        "sentence": diagnosis.sentence,
        "direction": diagnosis.direction,
        "change": diagnosis.change,
        "markers": diagnosis.markers,
        "means": diagnosis.means,
        "positions": diagnosis.positions,
        "config": diagnosis.config,
    }
    paths[0].write_text(json.dumps(content, indent=1), encoding="utf-8")
    with open(paths[1], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(diagnosis.tokens[0]))
        writer.writeheader()
        # The text as JSON, in its quotation marks: a spreadsheet takes a cell that begins with = + - or @ for a formula.
        writer.writerows(row | {"text": json.dumps(row["text"], ensure_ascii=False)} for row in diagnosis.tokens)
    try:
        plots = [_curves(diagnosis, folder / "curves.png"), _heatmap(diagnosis, folder / "heatmap.png")]
    except ImportError:
        plots = []
    page = folder / "report.html"
    page.write_text(_page(diagnosis, plots), encoding="utf-8")
    return [*paths, page, *plots]


def table(diagnosis: Diagnosis) -> str:
    """Markers' probabilities per completion token as aligned text."""
    width = max(map(len, diagnosis.markers))
    lines = [" " * width + "".join(f"{context:>11}" for context in CONTEXTS)]
    for word, row in diagnosis.markers.items():
        lines.append(f"{word:<{width}}" + "".join(f"{row[context]:>11.5f}" for context in CONTEXTS))
    return "\n".join(lines)


def changed(row: dict[str, Any]) -> float:
    """How much probability the sampled token would gain under the target, in [-1, 1]."""
    return row["target/token"] - row["base/token"]


def ranked(diagnosis: Diagnosis) -> list[list[dict[str, Any]]]:
    """Completions as lists of rows, sorted by probability mass moved per token, largest first."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for row in diagnosis.tokens:
        grouped.setdefault(row["completion"], []).append(row)
    return sorted(grouped.values(), key=lambda rows: -sum(row["mass_moved"] for row in rows) / len(rows))


def _curves(diagnosis: Diagnosis, path: Path) -> Path:
    drawn, axes = figure(2, 2, panel=(4.5, 3.0))
    points = diagnosis.positions
    places = [point["position"] for point in points]
    panels = (
        ("‖Δ_ref‖ / ‖Δ_total‖", {"reference_fraction": "raw", "weighted_reference_fraction": "weighted by π_θ"}),
        ("cosine with Δ_total", {"cos_total_reference": "Δ_ref", "cos_total_transferable": "Δ_it"}),
        ("share of probability mass moved", {"mass_moved": "target against base"}),
    )
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for dashes, (name, label) in zip(("-", "--"), lines.items(), strict=False):
            values = [point[name] for point in points]
            axis.plot(places, values, dashes, color=COLOURS["target"], label=label, **LINE)
        style(axis, title, "completion token")
    for context in CONTEXTS:
        values = [point[f"{context}/markers"] for point in points]
        axes[3].plot(places, values, color=COLOURS[context], label=context, **LINE)
    style(axes[3], "probability of the markers", "completion token")
    for axis in axes:
        legend(axis)
    return save(drawn, path)


def _heatmap(diagnosis: Diagnosis, path: Path) -> Path:
    """The completion that changes most, a cell per token."""
    rows = ranked(diagnosis)[0][:HEAT_TOKENS]
    lines = -(-len(rows) // HEAT_COLUMNS)
    drawn, (axis,) = figure(1, 1, size=(12, 0.42 * lines + 1.0))
    for place, row in enumerate(rows):
        line, column = divmod(place, HEAT_COLUMNS)
        red, green, blue = _colour(changed(row))
        axis.broken_barh([(column, 1)], (line, 1), color=(red / 255, green / 255, blue / 255), linewidth=0)
        text = repr(row["text"])[1:-1].strip() or "·"
        text = (text if len(text) <= 10 else text[:9] + "…").replace("$", r"\$")
        axis.text(column + 0.5, line + 0.5, text, ha="center", va="center", fontsize=TEXT)
    axis.set_xlim(0, HEAT_COLUMNS)
    axis.set_ylim(lines, 0)
    axis.set_axis_off()
    title = (
        f"Completion {rows[0]['completion']}: blue tokens gain probability under the purified target, orange ones lose"
    )
    axis.set_title(title, fontsize=10, loc="left")
    return save(drawn, path)


def _colour(change: float) -> tuple[int, int, int]:
    """White at no change, the full colour at a change of 0.5 or more. Larger changes are rare."""
    strength = min(abs(change) / 0.5, 1.0) * 0.75
    red, green, blue = (round(255 + strength * (full - 255)) for full in (UP if change > 0 else DOWN))
    return red, green, blue


def _page(diagnosis: Diagnosis, plots: Sequence[Path]) -> str:
    header = "".join(f"<th>{context}</th>" for context in CONTEXTS)
    body = "".join(
        f"<tr><th>{html.escape(word)}</th>" + "".join(f"<td>{row[context]:.5f}</td>" for context in CONTEXTS) + "</tr>"
        for word, row in diagnosis.markers.items()
    )
    images = "".join(f'<img alt="{plot.stem}" src="{data_uri(plot)}">' for plot in plots if plot.stem == "curves")
    if not plots:
        images = "<p>No plots: matplotlib is not installed (<code>pip install 'popsd[plots]'</code>).</p>"
    completions = "".join(
        f"<h3>Completion {rows[0]['completion']}</h3><p class='heat'>" + "".join(map(_span, rows)) + "</p>"
        for rows in ranked(diagnosis)[:SHOWN_IN_HTML]
    )
    return _PAGE.format(
        sentence=html.escape(diagnosis.sentence), header=header, body=body, images=images, completions=completions
    )


def _span(row: dict[str, Any]) -> str:
    numbers = (
        f"P(token): base {row['base/token']:.3f}, teacher {row['teacher/token']:.3f}, reference "
        f"{row['reference/token']:.3f}, target {row['target/token']:.3f}; mass moved {row['mass_moved']:.3f}"
    )
    text = html.escape(row["text"]).replace("\n", "↵\n") or "·"
    return f'<span title="{numbers}" style="background:rgb{_colour(changed(row))}">{text}</span> '


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>popsd diagnose</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} img {{ width: 100%; }}
th, td {{ padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }}
th:first-child {{ text-align: left; }} .heat {{ font-family: ui-monospace, monospace; white-space: pre-wrap; }}
.heat span {{ padding: 0 .15em; border-radius: .2em; }}
</style></head><body><h1>Before training: what the purified target would change</h1><p><b>{sentence}</b></p>
<p>Measured on the base model's own completions. A marker's probability is its mean per completion token. The target composes
base, teacher (question and reference solution) and reference (the solution alone), arXiv 2607.02234.</p>
<table><thead><tr><th></th>{header}</tr></thead><tbody>{body}</tbody></table>{images}
<h2>The completions that change most</h2><p>Blue tokens gain probability under the target, orange ones lose; hold the pointer
over a token for the numbers.</p>{completions}</body></html>
"""
