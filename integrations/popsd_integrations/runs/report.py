"""What a run's folder says of itself: its options, its curves and held-out completions on one page, and how to go on.

Everything is read from the folder, which the trainer and the plain loop fill alike.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from popsd_integrations.estimates import bootstrap
from popsd_integrations.pages import cut, html_table, page, side_by_side
from popsd_integrations.plotting import BLUE, VERMILLION
from popsd_integrations.run_folder import ADAPTER, checkpoints, saved_as, write_whole
from popsd_integrations.runs import held_out

METRICS, CONFIG, PAGE, MODEL = "metrics.jsonl", "popsd_config.json", "report.html", "model"
CURVES = {
    "loss per token, nats": ("loss",),
    "accuracy, held-out": ("eval/accuracy", "eval_accuracy"),
    "accuracy, held-out, greedy": ("eval/accuracy_greedy", "eval_accuracy_greedy"),
    "markers per completion": ("markers/per_completion",),
    "tokens per completion": ("completions/mean_length",),
    "KL(student‖base), nats": ("kl_base",),
    "student entropy, nats": ("student_entropy", "entropy"),
    "target entropy, nats": ("target_entropy",),
    "cos(Δ_total, Δ_ref)": ("decomposition/cos_total_reference",),
    "cos(Δ_total, Δ_it)": ("decomposition/cos_total_transferable",),
    "‖Δ_ref‖ / ‖Δ_total‖": ("decomposition/reference_fraction",),
}
"""Title of each curve, and the names under which the plain loop and the trainer log it."""
_PACKAGES = ("popsd", "torch", "triton", "transformers", "trl", "peft", "accelerate", "vllm", "math-verify")
SHOWN = 8


def points(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[int, float]:
    """Value by step of the first rows that log one of ``names``."""
    return {row["step"]: row[name] for row in history for name in names if isinstance(row.get(name), int | float)}


def lines_of(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[int, float]]:
    """What a panel shows: the curve in training, and that of evaluations."""
    trained = [name for name in names if not name.startswith("eval")]
    evaluated = [name if name.startswith("eval") else f"eval_{name}" for name in names]
    found = {"train": points(history, trained), "eval": points(history, evaluated)}
    return {name: curve for name, curve in found.items() if curve}


def write_config(
    folder: Path, *, base: str, options: Mapping[str, Any], data: Mapping[str, Any], evaluate: Sequence[str] = ()
) -> None:
    """Write the resolved options of a run as JSON.

    base: name or folder of the initial model. data: what is known of it. evaluate: options for ``popsd evaluate`` that
    make its prompts those of the run.
    """
    versions = {name: found for name in _PACKAGES if (found := _version(name))}
    content = {"model": base, "options": options, "data": data, "evaluate": list(evaluate), "versions": versions}
    text = json.dumps(_without_secrets(content), indent=1, default=str, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, lambda file: file.write(text.encode()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _without_secrets(value: Any) -> Any:
    """Without the values of token and …_token, which give access to an account."""
    if isinstance(value, Mapping):
        return {
            str(name): "(hidden)"
            if isinstance(x, str) and x and (name == "token" or str(name).endswith("_token"))
            else _without_secrets(x)
            for name, x in value.items()
        }
    return [_without_secrets(x) for x in value] if isinstance(value, list | tuple) else value


def how_to_go_on(folder: Path) -> list[str]:
    """Three lines: what was saved, how to load it, how to evaluate it. Of a run that saved no model only the first."""
    written = [name for name in (METRICS, CONFIG, held_out.FILE, "metrics.png", PAGE) if (folder / name).exists()]
    steps = [path for path in checkpoints(folder) if saved_as(path)]
    place = next((path for path in (folder / MODEL, folder, *reversed(steps)) if saved_as(path)), None)
    if place is None:
        return [f"Saved: no model yet, which the same run would go on to; {', '.join(written)} in {folder}"]
    base, options = _config(folder)["model"], _config(folder)["evaluate"]
    kept = f", and {len(steps)} checkpoints from {steps[0].name} to {steps[-1].name}" if steps else ""
    load = f"AutoModelForCausalLM.from_pretrained({str(place)!r})"
    if saved_as(place) == ADAPTER:
        load = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(place)!r})"
    command = [
        "popsd",
        "evaluate",
        "--model_name_or_path",
        base,
        "--adapters",
        str(folder if steps else place),
        *options,
    ]
    return [
        f"Saved: the {'adapter' if saved_as(place) == ADAPTER else 'model'} in {place}{kept}; {', '.join(written)} in {folder}",
        f"Load: {load}",
        f"Evaluate: {shlex.join(command)} --benchmarks aime24 aime25 hmmt25",
    ]


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def write_page(folder: Path) -> Path:
    """Write report.html: curves, held-out accuracy and completions, how to go on, and the options."""
    history = [row for row in held_out.read_lines(folder / METRICS) if "step" in row]
    config = _config(folder)
    parts = [f"<p>{html.escape(str(folder))}, {max((row['step'] for row in history), default=0):,} steps.</p>"]
    panels = [_panel(title, lines) for title, names in CURVES.items() if (lines := lines_of(history, names))]
    parts.append(f"<style>{_CSS}</style><div class='panels'>{''.join(panels)}</div>")
    parts += _judged(held_out.read_lines(folder / held_out.FILE))
    parts.append(f"<h2>How to go on</h2><pre>{html.escape(chr(10).join(how_to_go_on(folder)))}</pre>")
    facts = [("model", config["model"]), *config["data"].items(), *config["versions"].items()]
    facts += [(name, value) for name, value in config["options"].items() if value not in (None, [], {}, "")]
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in facts]
    parts.append(
        "<h2>Options, as resolved</h2>"
        + html_table([["option", "value"], *rows])
        + f"<p>All: <code>{CONFIG}</code>.</p>"
    )
    path = folder / PAGE
    write_whole(path, lambda file: file.write(page("popsd run", "".join(parts)).encode()))
    return path


def _judged(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The accuracies of the first and the last evaluation of each set of problems, and completions of the last."""
    if not records:
        return []
    rows = [["held-out", "step", "problems", "accuracy, sampled", "accuracy, greedy", "truncated"]]
    completions = ""
    for name in dict.fromkeys(record["set"] for record in records):
        own = [record for record in records if record["set"] == name]
        for step in dict.fromkeys((own[0]["step"], own[-1]["step"])):
            found = [record for record in own if record["step"] == step]
            kinds = {kind: [x for x in found if x["kind"] == kind] for kind in (held_out.SAMPLED, held_out.GREEDY)}
            intervals = [
                bootstrap([[float(x["correct"]) for x in part]], within=(0, 1)) for part in kinds.values() if part
            ]
            truncated = held_out.accuracies(found)["truncated"]
            problems = len(kinds[held_out.SAMPLED])
            rows.append([name, str(step), str(problems), *map(str, intervals), f"{truncated:.3f}"])
        beside = [
            side_by_side(
                f"{name}; answer {pair[0]['expected']}", {x["kind"]: {**x, "text": cut(x["text"])} for x in pair}
            )
            for pair in list(zip(*kinds.values(), strict=True))[:SHOWN]
        ]
        completions += f"<p>At step {own[-1]['step']}; all of them are in {held_out.FILE}.</p>" + "".join(beside)
    note = (
        "<p>Intervals: 95 %, bootstrap over problems. Of so few problems they are wide; popsd evaluate takes more.</p>"
    )
    return ["<h2>Held-out problems</h2>", html_table(rows), note, completions]


_WIDTH, _HEIGHT = 260, 110


def _panel(title: str, lines: Mapping[str, Mapping[int, float]]) -> str:
    """A curve as SVG, so that a page has curves without matplotlib. Values that are not finite are left out."""
    curves = {
        name: [(x, y) for x, y in sorted(curve.items()) if abs(y) < float("inf")] for name, curve in lines.items()
    }
    drawn = [point for curve in curves.values() for point in curve]
    if not drawn:
        return ""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*drawn, strict=True))

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{4 + across * (_WIDTH - 8):.1f},{_HEIGHT - 4 - up * (_HEIGHT - 8):.1f}"

    shapes, last = "", []
    for (name, curve), colour in zip(curves.items(), (BLUE, VERMILLION), strict=False):
        if curve:
            shapes += f'<polyline points="{" ".join(place(*point) for point in curve)}" stroke="{colour}"/>'
            x, y = place(*curve[-1]).split(",")
            shapes += f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
            last.append(f'<span style="color:{colour}">{name} {curve[-1][1]:.4g}</span>')
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {' '.join(last)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{shapes}</svg>'
        f"<small>from {low:.4g} to {high:.4g}; steps {left:,} to {right:,}</small></figure>"
    )


_CSS = """
.panels { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 260px; } figcaption { font-size: .85em; }
svg { width: 100%; border: 1px solid #ddd; } polyline { fill: none; stroke-width: 1.4; } small { color: #666; }
"""
