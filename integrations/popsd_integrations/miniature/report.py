"""The results as a table for the terminal, PNG plots, and a one-page HTML report that needs no network."""

from __future__ import annotations

import html
import re
import textwrap
from pathlib import Path
from typing import Any

from popsd_integrations.miniature.evaluate import Score
from popsd_integrations.miniature.task import STYLES
from popsd_integrations.pages import aligned
from popsd_integrations.plotting import COLOURS, LINE, TEXT, data_uri, figure, legend, save, style

COLUMNS = {
    "accuracy": "accuracy, T = 1",
    "accuracy_greedy": "accuracy, greedy",
    "markers": "markers per completion",
    "length": "tokens per completion",
    "eos_rate": "completions that end",
}
ROWS = {"base": "base (warm-up)", "opsd": "standard OPSD", "purified": "purified OPSD"}
NOTES = (
    "How terse teacher and reference-only teacher are is a design choice in the synthetic data: "
    f"{STYLES['teacher'].terse:.0%} of the teacher's tries are terse, {STYLES['reference'].terse:.0%} of the "
    f"reference-only teacher's, {STYLES['question'].terse:.0%} of the student's. With a teacher terser than the "
    "reference-only one, purified training loses markers and accuracy too.",
    "No gain over the base is claimed. Between seeds and warm-ups, purified ends somewhat above or below it. In all of "
    "them standard OPSD collapses, and the purified target keeps the markers and most of the accuracy at T = 1. "
    "Greedy decoding often loses some.",
    "The task is synthetic, the model has 162k parameters, and the warm-up was trained on all three contexts.",
)


def table(results: dict[str, Any]) -> str:
    """The scores as aligned text, with what they do and do not show."""
    cells = [["", *COLUMNS.values()]]
    cells += [[ROWS[row], *(_number(name, results[row][name]) for name in COLUMNS)] for row in ROWS]
    lines = aligned(cells)
    lines.insert(1, "-" * len(lines[0]))
    notes = [textwrap.fill(note, 110, initial_indent="* ", subsequent_indent="  ") for note in NOTES]
    return "\n".join([*lines, "", textwrap.fill(summary(results), 110), "", *notes])


def summary(results: dict[str, Any]) -> str:
    """One paragraph: sample sizes, noise, and the difference in style that predicts the outcome."""
    gap = results["style_gap"]
    return (
        f"Means over {len(results['per_seed']['opsd'])} seed(s); the standard error of an accuracy is "
        f"{results['standard_error']:.3f}. Before training, P(MAYBE) at the first token: base {gap['base']:.2f}, "
        f"teacher {gap['teacher']:.2f}, reference {gap['reference']:.2f}; purified target {gap['target']:.2f}. OPSD "
        "trains the student towards the teacher's value, purified towards the target's."
    )


def plot(results: dict[str, Any], output_dir: Path) -> list[Path]:
    """Write outcome.png and diagnostics.png; returns their paths. Raises ImportError without matplotlib."""
    outcome = {
        "eval/accuracy": "accuracy at T = 1",
        "eval/accuracy_greedy": "accuracy, greedy",
        "eval/markers": "markers per completion",
        "eval/length": "tokens per completion",
    }
    diagnostics = {
        "loss": "loss per token, nats",
        "student_entropy": "student entropy, nats",
        "decomposition/cos_total_reference": "cos(Δ_total, Δ_ref)",
        "decomposition/cos_total_transferable": "cos(Δ_total, Δ_it)",
        "decomposition/reference_fraction": "‖Δ_ref‖ / ‖Δ_total‖",
    }
    paths = []
    for name, panels, columns in (("outcome", outcome, 4), ("diagnostics", diagnostics, 3)):
        rows = -(-(len(panels) + (name == "diagnostics")) // columns)
        drawn, axes = figure(rows, columns)
        for axis, (key, title) in zip(axes, panels.items(), strict=False):
            _curves(axis, results, key, title)
        if name == "diagnostics":
            _gap_bars(axes[len(panels)], results["style_gap"])
        legend(axes[0])
        paths.append(save(drawn, Path(output_dir) / f"{name}.png"))
    return paths


def _curves(axis: Any, results: dict[str, Any], key: str, title: str) -> None:
    """One line per seed. An evaluated quantity starts at the base's value, at step 0."""
    field = key.removeprefix("eval/")
    base = results["base"][field] if key.startswith("eval/") and field in Score._fields else None
    for target in ("opsd", "purified"):
        for seed, steps in enumerate(results["steps"][target]):
            points = [(row["step"], row[key]) for row in steps if key in row]
            if base is not None:
                points.insert(0, (0, base))
            label = ROWS[target] if seed == 0 else None
            axis.plot(*zip(*points, strict=True), color=COLOURS[target], label=label, **LINE)
    if base is not None:
        axis.axhline(base, color=COLOURS["base"], linewidth=0.8, linestyle="--", label="base")
        axis.set_ylim(bottom=0)
    style(axis, title, "step")


def _gap_bars(axis: Any, gap: dict[str, float]) -> None:
    bars = axis.bar(list(gap), list(gap.values()), color=[COLOURS[name] for name in gap])
    axis.bar_label(bars, fmt="%.2f", fontsize=TEXT)
    axis.set_ylim(0, 1.1)
    style(axis, "P(MAYBE) at the first token, before training")


def write_html(results: dict[str, Any], plots: list[Path], path: Path) -> None:
    """One page that holds its images and loads nothing."""
    header = "".join(f"<th>{html.escape(title)}</th>" for title in ["", *COLUMNS.values()])
    body = "".join(
        f'<tr class="{row}"><th>{title}</th>'
        + "".join(f"<td>{_number(name, results[row][name])}</td>" for name in COLUMNS)
        + "</tr>"
        for row, title in ROWS.items()
    )
    images = "".join(f'<img alt="{image.stem}" src="{data_uri(image)}">' for image in plots)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in NOTES)
    missing = "" if plots else "<p>No plots: matplotlib is not installed (<code>pip install 'popsd[plots]'</code>).</p>"
    seconds = results["seconds"]
    Path(path).write_text(
        _PAGE.format(
            header=header,
            body=body,
            images=images or missing,
            example=beside(results["example"]),
            notes=notes,
            summary=html.escape(summary(results)),
            steps=results["config"]["max_steps"],
            batch=results["config"]["batch_size"],
            seconds=f"{seconds['total']:.0f}",
            warmup=f"{seconds['warm-up']:.0f}",
            opsd=COLOURS["opsd"],
            purified=COLOURS["purified"],
        ),
        encoding="utf-8",
    )


def beside(example: dict[str, Any]) -> str:
    """One problem and what base, OPSD and purified model write, a try on each line."""
    cells = "".join(
        f'<section class="{row}"><h3>{title}</h3><pre>{_tries(example["completions"][row]["text"])}</pre>'
        f"<p>{'Right' if example['completions'][row]['correct'] else 'Wrong'}, "
        f"{example['completions'][row]['tokens']} tokens</p></section>"
        for row, title in ROWS.items()
    )
    chosen = "Chosen: the first test puzzle that base and purified solve and OPSD does not. Means are in the table."
    if not example["wanted"]:
        chosen = "The first test puzzle. There is none that base and purified solve and OPSD does not."
    return (
        f"<h2>One problem, three models</h2><p><b>{html.escape(example['question'])}</b> Answer: {example['answer']}.</p>"
        f'<div class="beside">{cells}</div><p>Each samples at T = 1 from the same seed. MAYBE proposes a pair and CHECK says '
        f"its sum modulo 10. WAIT rejects it and OK accepts it. SO accepts a pair without a check. {chosen}</p>"
    )


def _tries(text: str) -> str:
    """A completion with a line for each try and for the answer."""
    return re.sub(r" (?=MAYBE|SO|ANS)", "\n", html.escape(text))


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name in ("markers", "length") else f"{value:.3f}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>popsd demo</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums;
}} th:first-child {{ text-align: left; }} thead th {{ font-weight: 600; font-size: .85em; }}
tr.opsd th, tr.opsd td:nth-child(2) {{ color: {opsd}; }} tr.purified th, tr.purified td:nth-child(2) {{ color: {purified}; }}
.beside {{ display: flex; flex-wrap: wrap; gap: 1rem; }} .beside section {{ flex: 1 1 16rem; }} h3 {{ margin: .3rem 0; }}
.beside pre {{ font-size: 17px; line-height: 1.6; background: #f6f6f6; padding: .8rem; margin: 0; white-space: pre-wrap; }}
section.opsd h3 {{ color: {opsd}; }} section.purified h3 {{ color: {purified}; }}
img {{ width: 100%; margin: .5rem 0; }} code {{ background: #f3f3f3; padding: 0 .2em; }}
</style></head><body> <h1>On-policy self-distillation in miniature</h1>
<p>A small reasoner looks for the two of four digits that sum to T modulo 10. It proposes, checks and doubts. It is distilled
on its own completions ({steps} steps of {batch}) towards a teacher that also sees the solution. Standard OPSD takes the
teacher itself as the target. The purified target removes what the solution alone would say (arXiv 2607.02234).</p>
<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table> <p>{summary}</p> {example} {images} <h2>What this does and
does not show</h2><ul>{notes}</ul> <p>{seconds} s of wall time, of which {warmup} s for the warm-up (next to nothing
when it is cached). All numbers, step by step: <code>results.json</code>.</p> </body></html>
"""
