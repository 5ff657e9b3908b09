"""A diagnosis as files: JSON, CSV, plots, and a page that loads nothing. Whatever comes from models and data is escaped."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popsd_integrations.diagnose import plots
from popsd_integrations.diagnose.plots import SCALE, changed, colour
from popsd_integrations.diagnose.summary import CANNOT_TELL, CONTEXTS, Diagnosis, times
from popsd_integrations.estimates import Interval
from popsd_integrations.pages import aligned
from popsd_integrations.plotting import data_uri

SHOWN_IN_HTML = 4
MEASURES = {
    "mass_moved": "probability mass that the target moves, ½·Σ|target − π_0|",
    "target_base_kl": "KL(target‖π_0), nats",
    "reference_fraction": "‖Δ_ref‖/‖Δ_total‖, arXiv 2607.02234, capped at 10",
    "weighted_reference_fraction": "the same, weighted by π_0",
    "cos_total_transferable": "cos(Δ_total, Δ_it)",
    "teacher_base_kl": "KL(π_T‖π_0), nats",
    "overlap": "share of π_T's 16 likeliest tokens that are π_0's too, arXiv 2604.13016",
    "overlap_advantage": "mean of −π_T·(log π_T − log π_0) over these, arXiv 2604.13016",
    "fork/target_base_kl": "KL(target‖π_0) at the 20 % of tokens where π_0 has most entropy",
    "fork/entropy_gained": "entropy of the target less that of π_0, at the same tokens",
}


def write(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Write diagnosis.json, tokens.csv, report.html and, where matplotlib is there, curves.png and heatmap.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "diagnosis.json", folder / "tokens.csv"]
    content = {name: getattr(diagnosis, name) for name in ("sentence", "direction", "change", "markers", "means")}
    content |= {name: getattr(diagnosis, name) for name in ("positions", "note", "about", "completions", "config")}
    paths[0].write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    with open(paths[1], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(diagnosis.tokens[0]))
        writer.writeheader()
        # The text as JSON, in its quotation marks: a spreadsheet takes a cell that begins with = + - or @ for a formula.
        writer.writerows(row | {"text": json.dumps(row["text"], ensure_ascii=False)} for row in diagnosis.tokens)
    try:
        drawn = [
            plots.curves(diagnosis, folder / "curves.png"),
            plots.heatmap(ranked(diagnosis)[0], folder / "heatmap.png"),
        ]
    except ImportError:
        drawn = []
    page = folder / "report.html"
    page.write_text(_page(diagnosis, drawn), encoding="utf-8")
    return [*paths, page, *drawn]


def marker_rows(diagnosis: Diagnosis) -> list[list[str]]:
    """Markers' probabilities per completion token, what the target makes of them, and the verdict; the first row the header."""
    rows = [["", *CONTEXTS, "target / base", "95 % interval", "would"]]
    for word, row in diagnosis.markers.items():
        change = row["change"]
        shown = ["–", "–"] if change is None else [f"{change.mean:.3f}", _between(change, 3)]
        rows.append([word, *(f"{row[context]:.5f}" for context in CONTEXTS), *shown, _would(row["verdict"])])
    return rows


def table(diagnosis: Diagnosis) -> str:
    """The same as aligned text, with what is to be known of the markers."""
    return "\n".join([*aligned(marker_rows(diagnosis)), *([f"* {diagnosis.note}."] if diagnosis.note else [])])


def ranked(diagnosis: Diagnosis) -> list[list[dict[str, Any]]]:
    """Completions as lists of rows, sorted by probability mass moved per token, largest first."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for row in diagnosis.tokens:
        grouped.setdefault(row["completion"], []).append(row)
    return sorted(grouped.values(), key=lambda rows: -sum(row["mass_moved"] for row in rows) / len(rows))


def _would(verdict: str) -> str:
    return verdict if verdict == CANNOT_TELL else {"raise": "rise", "lower": "fall"}.get(verdict, verdict)


def _between(interval: Interval, digits: int) -> str:
    return "–" if interval.low is None else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def _page(diagnosis: Diagnosis, drawn: Sequence[Path]) -> str:
    images = "".join(f'<img alt="{plot.stem}" src="{data_uri(plot)}">' for plot in drawn if plot.stem == "curves")
    if not drawn:
        images = "<p>No plots: matplotlib is not installed (<code>pip install 'popsd[plots]'</code>).</p>"
    measures = [["", "mean", "95 % interval"]]
    for name, said in MEASURES.items():
        if name in diagnosis.means:
            found = diagnosis.means[name]
            measures.append([said, f"{found.mean:.4f}", _between(found, 4)])
    scale = "".join(
        f'<span style="background:rgb{colour(change)}">{f"{change:+.2f}" if change else "0"}</span>' for change in SCALE
    )
    return _PAGE.format(
        sentence=html.escape(diagnosis.sentence),
        about=_table([[name, text] for name, text in diagnosis.about.items()], header=False),
        markers=_table(marker_rows(diagnosis)),
        note=f"<p>{html.escape(diagnosis.note)}.</p>" if diagnosis.note else "",
        measures=_table(measures),
        images=images,
        teacher=html.escape(times(diagnosis.markers["all"]["teacher_change"])),
        scale=scale,
        completions="".join(_completion(diagnosis, rows) for rows in ranked(diagnosis)[:SHOWN_IN_HTML]),
    )


def _table(rows: Sequence[Sequence[str]], header: bool = True) -> str:
    parts = []
    for place, row in enumerate(rows):
        tag = "th" if header and place == 0 else "td"
        first, *rest = (html.escape(cell) for cell in row)
        parts.append(f"<tr><th>{first}</th>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in rest) + "</tr>")
    return f"<table>{''.join(parts)}</table>"


def _completion(diagnosis: Diagnosis, rows: Sequence[dict[str, Any]]) -> str:
    number = rows[0]["completion"]
    prompts = "".join(
        f"<details{' open' * (name == 'question')}><summary>{_PROMPTS[name]}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in diagnosis.completions[number].items()
    )
    return f"<h3>Completion {number}</h3>{prompts}<p class='heat'>{''.join(map(_span, rows))}</p>"


_PROMPTS = {
    "question": "Question, as student and base read it",
    "teacher": "The teacher's prompt, with the reference solution",
    "reference": "The reference prompt",
}


def _span(row: dict[str, Any]) -> str:
    numbers = (
        f"P(token): base {row['base/token']:.3f}, teacher {row['teacher/token']:.3f}, reference "
        f"{row['reference/token']:.3f}, target {row['target/token']:.3f}; mass moved {row['mass_moved']:.3f}"
    )
    text = html.escape(row["text"]).replace("\n", "↵\n") or "·"
    left_out = " class='out'" if row["weight"] == 0 else ""
    return f'<span title="{numbers}"{left_out} style="background:rgb{colour(changed(row))}">{text}</span> '


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>popsd diagnose</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }} img {{ width: 100%; }} pre {{ white-space: pre-wrap; }}
th, td {{ padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }}
th:first-child, .about td {{ text-align: left; overflow-wrap: anywhere; }}
.heat {{ font-family: ui-monospace, monospace; white-space: pre-wrap; }}
.heat span, .scale span {{ padding: 0 .15em; border-radius: .2em; }} .scale span {{ padding: 0 .6em; }}
.out {{ text-decoration: line-through; }}
</style></head><body><h1>Before training: what the target would change</h1><p><b>{sentence}</b></p>
<div class="about">{about}</div>
<h2>Markers</h2><p>Measured on the base model's own completions. A marker's probability is its mean per completion token that
counts in the loss. The intervals are over completions, each marker by itself: of twenty rows that do not move, one is
expected to miss. All markers together under the teacher: {teacher}.</p>{markers}{note}
<h2>Measures</h2><p>Means per completion token. π_0 is the base, π_T the teacher.</p>{measures}{images}
<h2>The completions that change most</h2><p>Colour: how much probability the token gains or loses under the target; hold the
pointer over a token for the numbers. Struck through: not in the loss.</p><p class="scale">{scale}</p>{completions}
</body></html>
"""
