"""``popsd compare``: training runs and evaluations beside one another, on one page that loads nothing.

A run's folder may hold a training's metrics (metrics.jsonl, or a trainer's state in its last checkpoint), an evaluation by
``popsd evaluate`` (in it or in one of its folders), or both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popsd_integrations.estimates import Interval, bootstrap, paired_difference
from popsd_integrations.evaluate import generations, report
from popsd_integrations.evaluate.checkpoints import BASE
from popsd_integrations.evaluate.settings import labelled
from popsd_integrations.evaluate.summary import Problems, group, lengths, marker_rates, rates
from popsd_integrations.pages import cut, html_table, page
from popsd_integrations.plotting import LINE, figure, legend, save, style
from popsd_integrations.runs.report import CURVES, METRICS, points

STATE = "trainer_state.json"
LAST = 0.2
"""The share of the steps over which the end of a curve is averaged."""
NOTES = (
    "Evaluations: differences to the first one, paired problem by problem, with 95 % bootstrap intervals over problems. "
    "Of each run the last checkpoint is compared and not the best one, which is chosen by its accuracy.",
    f"Curves: means over the last {LAST:.0%} of the steps that both runs logged, paired step by step. The intervals take steps "
    "for independent. Neighbouring steps are not quite, so these are somewhat too narrow.",
)
SHOWN = 12


class Run(NamedTuple):
    """curves: of each title in CURVES, value by step. evaluated: the base and the last checkpoint of each run, by label."""

    label: str
    curves: dict[str, dict[int, float]]
    evaluated: dict[str, dict[str, Problems]]


def run(folders: Sequence[str], output_dir: Path) -> int:
    """Compare, print and write compare.html, comparison.json and curves.png. Raises ValueError on bad input.

    folders: of runs, each ``folder`` or ``label=folder``. The first one is what the others are compared with.
    """
    runs: list[Run] = []
    for name in folders:
        label, place = labelled(name, name.rstrip("/"))
        runs.append(read_run(label, Path(place)))
    evaluated = _columns(runs)
    trained = [found for found in runs if found.curves]
    if len(trained) < 2 and len(evaluated) < 2:
        raise ValueError(
            f"runs: expected at least two trainings, or two models that were evaluated; got {len(trained)} and "
            f"{len(evaluated)} in {', '.join(folders)}. Name more folders."
        )
    tables = [table for table in (evaluation_rows(evaluated), curve_rows(trained)) if len(table) > 1]
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        plots = [_plot(trained, output_dir / "curves.png")] if trained else []
        missing = ""
    except ImportError:
        plots, missing = [], report.images([])
    body = "".join(map(html_table, tables)) + report.images(plots) * bool(plots) + missing
    body += "<ul>" + "".join(f"<li>{note}</li>" for note in NOTES) + "</ul>"
    problems = side_by_side(evaluated)
    if problems:
        body += "<h2>The same problem side by side</h2><p>First those that not all solve.</p>"
        body += "".join(map(report.beside, problems))
    path, content = output_dir / "compare.html", output_dir / "comparison.json"
    path.write_text(page("popsd compare", body), encoding="utf-8")
    text = json.dumps({"runs": list(folders), "tables": tables}, indent=1, ensure_ascii=False)
    content.write_text(text, encoding="utf-8")
    print("\n\n".join([*map(report.aligned, tables), "\n".join(f"* {note}" for note in NOTES)]) + "\n")
    print("Written: " + ", ".join(map(str, (path, content, *plots))))
    return 0


def read_run(label: str, folder: Path) -> Run:
    """What a folder holds. Raises ValueError where that is nothing, or cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"runs: expected a folder; got {str(folder)!r}.")
    history = _history(folder)
    curves = {}
    for title, names in CURVES.items():
        if curve := points(history, names):
            curves[title] = curve
    found = [
        path for path in (folder / generations.FILE, *sorted(folder.glob(f"*/{generations.FILE}"))) if path.exists()
    ]
    if len(found) > 1:
        raise ValueError(
            f"runs: expected one evaluation in {folder}; got {', '.join(map(str, found))}. Name one of these folders."
        )
    evaluated = group(generations.read(found[0])) if found else {}
    if not curves and not evaluated:
        raise ValueError(
            f"runs: expected {METRICS}, a checkpoint with {STATE} or {generations.FILE} in {folder}; got none with anything "
            "to compare."
        )
    kept = generations.read_settings(found[0].parent)["checkpoints"] if found else {}
    last: dict[str, str] = {}
    for name in evaluated:
        last[kept.get(name, {"run": name})["run"]] = name  # of each run the last checkpoint
    return Run(label, curves, {name: evaluated[name] for name in last.values()})


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")
        try:
            rows = [json.loads(line) for line in lines[:-1] if line]  # a last line without an end was cut off by a kill
        except ValueError as error:
            raise ValueError(f"runs: expected a JSON object in each line of {path}; got {error}.") from error
        return [row for row in rows if "step" in row]
    states = [*folder.glob(f"checkpoint-*/{STATE}"), *folder.glob(STATE)]
    if not states:
        return []
    newest = max(states, key=lambda path: path.stat().st_mtime)
    return [row for row in json.loads(newest.read_text(encoding="utf-8"))["log_history"] if "step" in row]


def _columns(runs: Sequence[Run]) -> dict[str, dict[str, Problems]]:
    """What was evaluated, by heading: the base once, then the last checkpoint of each run."""
    columns: dict[str, dict[str, Problems]] = {}
    for found in runs:
        for name, parts in found.evaluated.items():
            heading = name if name == BASE or len(runs) == 1 else f"{found.label}: {name}"
            if heading not in columns:
                columns[heading] = parts
    return columns


def evaluation_rows(columns: Mapping[str, dict[str, Problems]]) -> list[list[str]]:
    """Accuracy, markers and length of each column, and their differences to the first one."""
    rows = [["evaluation", "accuracy, %", "−", "the paper's markers", "−", "tokens", "−"]]
    first = next(iter(columns.values()), {})
    for heading, parts in columns.items():
        comparable = parts is not first and _questions(parts) == _questions(first)
        cells = [heading]
        for measure, shown in ((rates, report.percent), (marker_rates, _plain), (lengths, _plain)):
            values = [measure(problems) for problems in parts.values()]
            cells.append(shown(bootstrap(values)))
            if comparable:
                difference = paired_difference(values, [measure(problems) for problems in first.values()])
                cells.append(shown(difference, sign=True))
            else:
                cells.append("" if parts is first else "other problems")
        rows.append(cells)
    return rows


def _questions(parts: Mapping[str, Problems]) -> dict[str, list[str]]:
    return {name: [rows[0]["question"] for rows in problems] for name, problems in parts.items()}


def _plain(value: Interval, sign: bool = False) -> str:
    how = "+.2f" if sign else ".2f"
    return f"{value.mean:{how}}" + ("" if value.low is None else f" [{value.low:{how}}, {value.high:{how}}]")


def curve_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Where the curves end, and the differences of each run to the first one."""
    rows = [
        ["end of training", *(x for found in runs for x in ([found.label] if found is runs[0] else [found.label, "−"]))]
    ]
    for title in CURVES:
        if not any(title in found.curves for found in runs):
            continue
        first = runs[0].curves.get(title, {})
        cells = [title]
        for found in runs:
            own = found.curves.get(title, {})
            cells.append(f"{_end([own]).mean:.4g}" if own else "–")
            if found is not runs[0]:
                common = sorted(own.keys() & first.keys())
                cells.append(_plain(_end([own, first], common), sign=True) if common else "–")
        rows.append(cells)
    return rows


def _end(curves: Sequence[dict[int, float]], steps: Sequence[int] | None = None) -> Interval:
    """Of one curve the mean over its last steps, of two the mean difference."""
    own, *other = curves
    steps = sorted(own) if steps is None else steps
    steps = steps[-max(1, round(LAST * len(steps))) :]
    return bootstrap([[own[step] - sum(x[step] for x in other) for step in steps]])


def side_by_side(columns: Mapping[str, dict[str, Problems]]) -> list[dict[str, dict[str, Any]]]:
    """The first sample of the problems that all columns have, first those on which these differ."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for heading, parts in columns.items():
        for name, problems in parts.items():
            for rows in problems:
                shown = rows[0] | {"text": cut(rows[0]["text"])}
                found.setdefault((name, rows[0]["question"]), {})[heading] = shown
    common = [rows for rows in found.values() if len(rows) == len(columns) > 1]
    return sorted(common, key=lambda rows: len({row["correct"] for row in rows.values()}), reverse=True)[:SHOWN]


def _plot(runs: Sequence[Run], path: Path) -> Path:
    titles = [title for title in CURVES if any(title in found.curves for found in runs)]
    columns = min(3, len(titles))
    drawn, axes = figure(-(-len(titles) // columns), columns)
    for axis, title in zip(axes, titles, strict=False):
        for found, colour in zip(runs, report.colours([found.label for found in runs]).values(), strict=True):
            if title in found.curves:
                points = sorted(found.curves[title].items())
                look = LINE | ({"marker": ""} if len(points) > 30 else {})
                axis.plot(*zip(*points, strict=True), color=colour, label=report.tex(found.label), **look)
        style(axis, title, "step")
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    legend(axes[0])
    return save(drawn, path)
