"""An evaluation as text, JSON, plots, and a page that loads nothing. Whatever comes from models and data is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popsd_integrations import pages
from popsd_integrations.estimates import Interval
from popsd_integrations.evaluate.checkpoints import BASE
from popsd_integrations.evaluate.summary import DRAWN_SET, MARKER_SETS, interval, overall, step_of
from popsd_integrations.pages import cut, html_table, page, side_by_side
from popsd_integrations.plotting import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    LINE,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILLION,
    data_uri,
    figure,
    legend,
    save,
    style,
)

MARK = "← best"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK)
NOTES = (
    "Intervals: 95 %, bootstrap over problems; a benchmark's samples of one problem are not taken for independent. "
    "The difference to the base is paired, problem by problem. Where all problems give the same there is no interval.",
    "The best checkpoint of a run is chosen by the very accuracy it is reported with. What that gains by itself is in the "
    "table of selected checkpoints: the expected lead of the best of so many equally good ones.",
    "Markers of the paper and of Kim et al. are lower-case substrings (unlikely counts as likely). Whole words are fewer; "
    "the two are not to be compared.",
    "Truncated: stopped by max_completion_length. Unformatted: no \\boxed answer after the block of thought.",
)


def write(results: dict[str, Any], records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write results.json, report.html and, where matplotlib is there, accuracy.png and markers.png; return all paths."""
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    try:
        plots = [_plot(results, "accuracy", folder), _plot(results, "markers", folder)]
    except ImportError:
        plots = []
    page = folder / "report.html"
    page.write_text(_page(results, records, plots), encoding="utf-8")
    return [folder / "generations.jsonl", path, page, *plots]


def table(results: dict[str, Any]) -> str:
    """The accuracies and the markers as aligned text, with what they are."""
    parts = [aligned(rows) for rows in (accuracy_rows(results), selected_rows(results), marker_rows(results)) if rows]
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in NOTES)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns; the first row is the header."""
    header, *lines = pages.aligned(rows)
    return "\n".join([header, "-" * len(header), *lines])


def accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    """The paper's table: each benchmark and their mean, base first, then every checkpoint, the best of a run marked."""
    models, k = results["models"], results["samples"]
    best = {found["label"] for found in results["selected"].values() if found["of"] > 1}
    shown = list(next(iter(models.values())))
    header = [
        f"accuracy, mean of {k}, %",
        *shown,
        "difference to base",
        f"pass@{k}",
        "majority",
        "truncated",
        "unformatted",
        "tokens per completion",
        "",
    ]
    rows = [header]
    for label, scores in models.items():
        total = overall(scores)
        rows.append(
            [
                label,
                *(percent(interval(scores[name]["accuracy"])) for name in shown),
                percent(interval(total["difference"].get("accuracy")), sign=True),
                percent(total["pass_at"][str(k)]),
                percent(interval(total["majority"])),
                percent(total["truncated"]),
                percent(total["unformatted"]),
                f"{total['length']['mean']:,.0f}",
                MARK if label in best else "",
            ]
        )
    return rows


def selected_rows(results: dict[str, Any]) -> list[list[str]]:
    """The best checkpoint of each run that has several, apart."""
    rows = [["run", "selected checkpoint", "accuracy, %", "difference to base", "of that by selection alone"]]
    for run, found in results["selected"].items():
        if found["of"] > 1:
            total = overall(results["models"][found["label"]])
            gain = found["gain_by_selection"]
            rows.append(
                [
                    run,
                    f"{found['label']} (best of {found['of']})",
                    percent(interval(total["accuracy"])),
                    percent(interval(total["difference"].get("accuracy")), sign=True),
                    "unknown with one sample" if gain is None else f"{100 * gain:+.1f}",
                ]
            )
    return rows if len(rows) > 1 else []


def marker_rows(results: dict[str, Any]) -> list[list[str]]:
    """Totals, per completion and per 1,000 tokens of each set of markers, over all benchmarks; with the lengths."""
    rows = [["model", "markers", "total", "per completion", "difference to base", "per 1,000 tokens"]]
    rows[0] += ["tokens per completion", "longest completion"]
    for label, scores in results["models"].items():
        total = overall(scores)
        for name, counted in total["markers"].items():
            cells = [label, name, f"{counted['total']:,}", f"{counted['per_completion']:.2f}"]
            cells.append(number(interval(total["difference"].get("markers"))) if name == DRAWN_SET else "")
            cells += [f"{counted['per_thousand_tokens']:.2f}"]
            rows.append([*cells, f"{total['length']['mean']:,.0f}", f"{total['length']['longest']:,}"])
    return rows


def word_rows(results: dict[str, Any], name: str) -> list[list[str]]:
    """Totals of each word of one set."""
    words = results["markers"][name]["words"]
    counts = [[overall(x)["markers"][name]["counts"][word] for word in words] for x in results["models"].values()]
    return [
        [name, *words],
        *([label, *(f"{count:,}" for count in row)] for label, row in zip(results["models"], counts, strict=True)),
    ]


def percent(value: Any, sign: bool = False) -> str:
    """A share or an Interval of shares, in percent; "–" where there is none."""
    if value is None:
        return "–"
    mean, low, high = value if isinstance(value, tuple) else (value, None, None)
    shown = f"{100 * mean:{'+' if sign else ''}.1f}"
    return (
        shown
        if low is None
        else f"{shown} [{100 * low:{'+' if sign else ''}.1f}, {100 * high:{'+' if sign else ''}.1f}]"
    )


def number(value: Any) -> str:
    """An Interval with its sign; "–" where there is none."""
    if value is None:
        return "–"
    return f"{value.mean:+.2f}" + ("" if value.low is None else f" [{value.low:+.2f}, {value.high:+.2f}]")


def images(plots: Sequence[Path]) -> str:
    """Plots within the page, or why there is none."""
    if not plots:
        return "<p>No plots: matplotlib is not installed (<code>pip install 'popsd[plots]'</code>).</p>"
    return "".join(f'<img alt="{html.escape(plot.stem)}" src="{data_uri(plot)}">' for plot in plots)


def beside(columns: dict[str, dict[str, Any]]) -> str:
    """Completions of one problem beside one another. columns: a record under each heading."""
    first = next(iter(columns.values()))
    title = f"{first['benchmark']} {first['problem']}, sample {first['sample']}; answer {first['expected']}"
    return side_by_side(title, columns)


def _page(results: dict[str, Any], records: Sequence[dict[str, Any]], plots: Sequence[Path]) -> str:
    about = results["about"]
    best = {found["label"] for found in results["selected"].values() if found["of"] > 1}
    classes = ["selected" if label in best else "" for label in results["models"]]
    facts = [["setting", "value"], *([name, _plain(value)] for name, value in about["settings"].items())]
    facts += [[name, _plain(about[name])] for name in ("scorer", "command", "date", "seconds")]
    facts += [[f"checkpoint {label}", path] for label, path in about["checkpoints"].items()]
    parts = [html_table(accuracy_rows(results), classes)]
    if selected := selected_rows(results):
        parts.append("<h2>Selected checkpoints</h2>" + html_table(selected))
    parts += [images(plots), "<h2>Epistemic markers and lengths</h2>", html_table(marker_rows(results))]
    parts += [f"<h3>{name}</h3>" + html_table(word_rows(results, name)) for name in MARKER_SETS if name != DRAWN_SET]
    parts.append("<h2>How to read this</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in NOTES) + "</ul>")
    parts.append("<h2>Completions</h2><p>The first sample of each problem; all of them are in generations.jsonl.</p>")
    parts += [beside(columns) for columns in first_samples(records)]
    parts.append("<h2>What was run</h2>" + html_table(facts))
    if about.get("missing"):
        parts.insert(0, f"<p><b>A part of the evaluation. Missing are {html.escape(about['missing'])}.</b></p>")
    if about["prompt"]:
        parts.append(f"<h3>The first prompt</h3><pre>{html.escape(about['prompt'])}</pre>")
    return page("popsd evaluate", "".join(parts))


SHOWN_PROBLEMS = 12


def first_samples(records: Sequence[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Of the first problems, the first sample by each checkpoint. A long completion is cut in its middle."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["sample"] == 0:
            found.setdefault((record["benchmark"], record["problem"]), {})[record["model"]] = record | {
                "text": cut(record["text"])
            }
    return list(found.values())[:SHOWN_PROBLEMS]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plot(results: dict[str, Any], what: str, folder: Path) -> Path:
    """A panel per benchmark: checkpoints of a run over their steps, or one beside another, and the base's line."""
    models = results["models"]
    shown = list(next(iter(models.values())))
    drawn, axes = figure(1, len(shown), panel=(4.2, 3.2))
    labels = [label for label in models if label != BASE]
    runs = list(dict.fromkeys(results["runs"][label] for label in labels))
    steps = {
        label: step_of(label) if results["selected"][results["runs"][label]]["of"] > 1 else None for label in labels
    }
    by_step = labels and all(step is not None for step in steps.values())
    for axis, name in zip(axes, shown, strict=True):
        if BASE in models:
            mean, low, high = _drawn(models[BASE][name], what)
            axis.axhline(mean, color=COLOURS["base"], linestyle="--", linewidth=1, label=BASE)
            axis.axhspan(low, high, color=COLOURS["base"], alpha=0.12, linewidth=0)
        for run, colour in colours(runs).items():
            own = [label for label in labels if results["runs"][label] == run]
            x = [steps[label] if by_step else labels.index(label) for label in own]
            values = [_drawn(models[label][name], what) for label in own]
            bars = [[m - low for m, low, _ in values], [high - m for m, _, high in values]]
            axis.errorbar(x, [m for m, _, _ in values], yerr=bars, color=colour, capsize=2, label=tex(run), **LINE)
        if not by_step:
            axis.set_xticks(range(len(labels)), [""] * len(labels))
        axis.set_ylim(bottom=0)
        title = {"accuracy": "accuracy", "markers": "the paper's markers per completion"}[what]
        style(axis, f"{tex(name)}: {title}", "step" if by_step else "")
    legend(axes[0])
    return save(drawn, folder / f"{what}.png")


def _drawn(scores: dict[str, Any], what: str) -> tuple[float, float, float]:
    mean, low, high = Interval(**scores[{"accuracy": "accuracy", "markers": "marker_rate"}[what]])
    return mean, mean if low is None else low, mean if high is None else high


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each run. "opsd" and "purified" have theirs wherever they are drawn."""
    own = {name: COLOURS[name] for name in names if name in COLOURS}
    free = [colour for colour in PALETTE if colour not in own.values()]
    others = [name for name in names if name not in own]
    return {name: own.get(name) or free[others.index(name) % len(free)] for name in names}


def tex(text: str) -> str:
    """Text for matplotlib, which reads what stands between dollars as formulas."""
    return text.replace("$", r"\$")
