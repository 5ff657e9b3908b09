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
from popsd_integrations.evaluate.settings import FILE, labelled
from popsd_integrations.evaluate.summary import Problems, group, lengths, marker_rates, rates, step_of
from popsd_integrations.pages import cut, html_table, page
from popsd_integrations.plotting import LINE, figure, legend, save, style
from popsd_integrations.runs.held_out import read_lines
from popsd_integrations.runs.report import CURVES, METRICS, points

STATE = "trainer_state.json"
LAST = 0.2
"""The share of the steps over which the end of a curve is averaged."""
NOTES = (
    "Evaluations: means with 95 % bootstrap intervals over problems, and differences to the first one, paired problem by "
    "problem. "
    "Where problems, base or settings are others there is no difference, and the row says which. "
    "Of each run the last checkpoint is compared and not the best one, which is chosen by its accuracy.",
    f"Curves: means over the last {LAST:.0%} of the steps that both runs logged, paired step by step. The intervals take steps "
    "for independent. Neighbouring steps are not quite, so these are somewhat too narrow.",
)
SHOWN = 12


class Evaluated(NamedTuple):
    """One model's records by benchmark. settings: what they depend on, its own weights and the seed aside."""

    parts: dict[str, Problems]
    settings: dict[str, Any]

    def differs(self, first: Evaluated) -> str:
        """Why this cannot be paired with ``first``; empty where it can."""
        if _questions(self.parts) != _questions(first.parts):
            return "other problems"
        names = dict.fromkeys([*first.settings, *self.settings])
        other = [name for name in names if first.settings.get(name) != self.settings.get(name)]
        return f"other {', '.join(other)}" if other else ""


class Run(NamedTuple):
    """curves: of each title in CURVES, value by step. evaluated: the base and the last checkpoint of each run, by label."""

    label: str
    curves: dict[str, dict[int, float]]
    evaluated: dict[str, Evaluated]


def run(folders: Sequence[str], output_dir: Path) -> int:
    """Compare, print and write compare.html, comparison.json and curves.png. Raises ValueError on bad input.

    folders: of runs, each ``folder`` or ``label=folder``. The first one is what the others are compared with.
    """
    runs: list[Run] = []
    for name in folders:
        label, place = labelled(name, name.rstrip("/"))
        if label in [found.label for found in runs]:
            raise ValueError(f"runs: expected each label once; got {label!r} again. Write label=folder.")
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
    found = [path for path in (folder / FILE, *sorted(folder.glob(f"*/{FILE}"))) if path.exists()]
    if len(found) > 1:
        raise ValueError(
            f"runs: expected one evaluation in {folder}; got {', '.join(map(str, found))}. Name one of these folders."
        )
    evaluated = group(generations.read(found[0])) if found else {}
    if not curves and not evaluated:
        raise ValueError(
            f"runs: expected {METRICS}, a checkpoint with {STATE} or {FILE} in {folder}; got none with anything "
            "to compare."
        )
    if not found:
        return Run(label, curves, {})
    kept = generations.read_settings(found[0].parent)
    last: dict[str, str] = {}
    for name in evaluated:
        run = kept["checkpoints"].get(name, {"run": name})["run"]
        if run not in last or (step_of(name) or 0) >= (step_of(last[run]) or 0):  # not the one evaluated last
            last[run] = name
    settings = _settings(kept)
    return Run(label, curves, {name: Evaluated(evaluated[name], settings) for name in last.values()})


def _settings(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What evaluations must share to be paired. The base is known by its weights where it is a folder, or by its name."""
    settings = {
        "model_init_kwargs": {},
        **kept["settings"],
        "scorer": kept["scorer"],
        "scorer code": kept.get("scorer_code"),
    }
    settings.pop("seed", None)
    model = settings.pop("model", None)
    return settings | {"base": kept["checkpoints"].get(BASE, {}).get("weights") or model}


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    if path.exists():
        try:
            rows = read_lines(path)
        except ValueError as error:
            raise ValueError(f"runs: expected a JSON object in each line of {path}; got {error}.") from error
        return [row for row in rows if "step" in row]
    states = [*folder.glob(f"checkpoint-*/{STATE}"), *folder.glob(STATE)]
    if not states:
        return []
    histories = [json.loads(path.read_text(encoding="utf-8"))["log_history"] for path in states]
    found = [[row for row in rows if "step" in row] for rows in histories]
    return max(
        found, key=lambda rows: max((row["step"] for row in rows), default=0)
    )  # files may be copied in any order


def _columns(runs: Sequence[Run]) -> dict[str, Evaluated]:
    """What was evaluated, by heading: each base once, then the last checkpoint of each run."""
    columns: dict[str, Evaluated] = {}
    for found in runs:
        for name, model in found.evaluated.items():
            heading = name if name == BASE or len(runs) == 1 else f"{found.label}: {name}"
            if heading in columns and model.differs(columns[heading]):
                heading = f"{found.label}: {name}"  # another base, or the same one asked otherwise
            columns.setdefault(heading, model)
    return columns


def evaluation_rows(columns: Mapping[str, Evaluated]) -> list[list[str]]:
    """Accuracy, markers and length of each column, and their differences to the first one, or why there is none."""
    heading = next(iter(columns), "")
    rows = [["evaluation", *(x for name in MEASURES for x in (name, f"difference to {heading}"))]]
    for name, model in columns.items():
        first = columns[heading]
        reason = model.differs(first)
        cells = [name]
        for measure, shown in MEASURES.values():
            values = [measure(problems) for problems in model.parts.values()]
            cells.append(shown(bootstrap(values)))
            if model is first or reason:
                cells.append(reason)
            else:
                difference = paired_difference(values, [measure(problems) for problems in first.parts.values()])
                cells.append(shown(difference, sign=True))
        rows.append(cells)
    return rows


def _questions(parts: Mapping[str, Problems]) -> dict[str, list[str]]:
    return {name: [rows[0]["question"] for rows in problems] for name, problems in parts.items()}


def _plain(value: Interval, sign: bool = False) -> str:
    mean = _number(value.mean, sign)
    return (
        mean
        if value.low is None or value.high is None
        else f"{mean} [{_number(value.low, sign)}, {_number(value.high, sign)}]"
    )


def _number(value: float, sign: bool) -> str:
    """Two decimals, or three significant digits of what is small: a loss may differ by 1e-5."""
    how = ".3g" if 0 < abs(value) < 1 else ".2f"
    return f"{value + 0.0:{'+' if sign else ''}{how}}"  # -0.0 + 0.0 is 0.0


MEASURES = {
    "accuracy, %": (rates, report.percent),
    "the paper's markers per completion": (marker_rates, _plain),
    "tokens per completion": (lengths, _plain),
}


def curve_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Where the curves end, and the differences of each run to the first one."""
    header = [f"training, last {LAST:.0%} of the steps"]
    for found in runs:
        header += [found.label] if found is runs[0] else [found.label, f"difference to {runs[0].label}"]
    rows = [header]
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


def side_by_side(columns: Mapping[str, Evaluated]) -> list[dict[str, dict[str, Any]]]:
    """The first sample of each problem by all columns that can be paired, first the problems on which these differ."""
    columns = {name: model for name, model in columns.items() if not model.differs(next(iter(columns.values())))}
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for heading, model in columns.items():
        for name, problems in model.parts.items():
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
