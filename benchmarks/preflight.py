"""Does the pre-flight check predict what training does? The miniature in four styles of data, and masks where it fails.

    python benchmarks/preflight.py [--seeds 0 1 --cases plain --output-dir runs/preflight]

For each case: warm up, diagnose the base model (`popsd diagnose`), then train on the purified target for 50 steps, and set
the change of the markers' probability beside the markers before and after. Two tables go to stdout and to table.md: the
cases, and how each measure's order of the cases agrees with what training did to them. rows.json has all of it.
Three CPU minutes for each style and half a minute for each further run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from popsd import PurifiedConfig
from popsd.markers import EpistemicMarkers
from popsd_integrations.diagnose.measure import DiagnoseConfig, diagnose
from popsd_integrations.diagnose.summary import CANNOT_TELL
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.miniature import task
from popsd_integrations.miniature.evaluate import evaluate
from popsd_integrations.miniature.experiment import ExperimentConfig, distil
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.tokenizer import TOKEN_ID, build_tokenizer
from popsd_integrations.miniature.warmup import warm_up


class Style(NamedTuple):
    """P(a try is terse) of teacher and reference-only teacher; whether terse tries begin with a token of their own."""

    teacher: float
    reference: float
    token: bool = True


STYLES = {
    "reference terser": Style(0.6, 0.8),
    "equal": Style(0.6, 0.6),
    "teacher terser": Style(0.8, 0.6),
    "no style token": Style(0.6, 0.8, token=False),
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "plausibility 0.03": {"plausibility": 0.03},
    "plausibility 0.1": {"plausibility": 0.1},
    "plausibility 0.3": {"plausibility": 0.3},
    "tail below 0.05 capped at 0.1": {"tail_floor": 0.05, "tail_cap": 0.1},
}
CASES = [(style, "none") for style in STYLES]
CASES += [("no style token", masks) for masks in MASKS if masks != "none"]
CASES += [("reference terser", "plausibility 0.3"), ("teacher terser", "plausibility 0.3")]
HEADER = """\
| data | masks on entries | target / base | 95 % interval | pre-flight | markers per completion | accuracy, T = 1 | agrees |
|---|---|---|---|---|---|---|---|
"""
MEASURES = ("mass_moved", "target_base_kl", "reference_fraction", "weighted_reference_fraction", "cos_total_transferable",
            "teacher_base_kl", "overlap", "overlap_advantage", "fork/target_base_kl", "fork/entropy_gained")  # fmt: skip
"""Of `Diagnosis.means`, beside the markers' change under the target and under the teacher."""


def run(style: str, masks: str, seeds: list[int], folder: Path) -> dict[str, Any]:
    """One case. The miniature's data are written in this style meanwhile."""
    config, of, write = ExperimentConfig(loss=PurifiedConfig(**MASKS[masks])), STYLES[style], task.write_completion
    terse = {name: task.STYLES[name]._replace(terse=getattr(of, name)) for name in ("teacher", "reference")}
    written = write if of.token else lambda *a: [token for token in write(*a) if token != TOKEN_ID["SO"]]
    cache = folder / ("warm-up" if of.token else "warm-up-no-token")
    name = f"{style}-{masks}".replace(" ", "_")
    with patch.dict(task.STYLES, terse), patch.object(task, "write_completion", written):
        model, tokenizer = warm_up(config.warmup, cache), build_tokenizer()
        test = task.draw_puzzles(config.test_puzzles, "test", seed=0)
        problems = [puzzle.problem for puzzle in task.draw_puzzles(256, "train", seed=1000)]
        prompts = ContextBuilder(tokenizer, task.MINIATURE_CONTEXTS).build_all(problems)
        markers = EpistemicMarkers(("maybe", "check", "wait"))
        options = DiagnoseConfig(
            completions=256, batch_size=64, max_new_tokens=task.MAX_NEW_TOKENS, loss=config.loss, markers=markers
        )
        found = diagnose(model, tokenizer, prompts, options, generate=sample, progress=False)
        before = evaluate(model, test)
        ends = [distil(config, "purified", seed, folder / f"{name}-{seed}", cache)[-1] for seed in seeds]
    outcome = {
        name: [getattr(before, name), *(end[f"eval/{name}"] for end in ends)] for name in ("markers", "accuracy")
    }
    growth = _after(outcome["markers"])
    became = "raise" if growth > 1.1 else "lower" if growth < 0.9 else "keep"
    measures = {name: list(found.means[name]) for name in MEASURES}
    measures |= {name: list(found.markers["all"][key]) for name, key in CHANGES.items()}
    return {
        "style": style,
        "masks": masks,
        "direction": found.direction,
        **outcome,
        "agrees": {became: "yes", CANNOT_TELL: "–"}.get(found.direction, "no"),
        "measures": measures,
    }


CHANGES = {"markers, target / base": "change", "markers, teacher / base": "teacher_change"}


def _after(values: list[float]) -> float:
    """The mean after training, relative to before."""
    before, *after = values
    return sum(after) / len(after) / before


def agreement(rows: list[dict[str, Any]]) -> str:
    """Spearman's rank correlation over the cases of each measure with what training did, as a table."""
    styles = len({row["style"] for row in rows})
    lines = [f"Spearman's rank correlation over n = {len(rows)} cases on {styles} warm-ups:", ""]
    lines += ["| measure | with the change of markers | with the change of accuracy |", "|---|---|---|"]
    done = [[_after(row[name]) for row in rows] for name in ("markers", "accuracy")]
    for name in rows[0]["measures"]:
        values = [row["measures"][name][0] for row in rows]
        found = [spearman(values, outcome) for outcome in done]
        lines.append(f"| {name} | " + " | ".join("–" if x is None else f"{x:+.2f}" for x in found) + " |")
    return "\n".join(lines) + "\n"


def spearman(a: list[float], b: list[float]) -> float | None:
    """Correlation of ranks; equal values share their mean rank. None of fewer than three, or where one has no order."""
    ranks = np.array([[(np.less(x, y).sum() + np.less_equal(x, y).sum()) / 2 for y in x] for x in (a, b)])
    return float(np.corrcoef(ranks)[0, 1]) if len(a) > 2 and ranks.std(axis=1).min() > 0 else None


def as_row(found: dict[str, Any]) -> str:
    def change(values: list[float], digits: int) -> str:
        before, *after = (f"{x:.{digits}f}" for x in values)
        return f"{before} → {', '.join(after)}"

    mean, low, high = found["measures"]["markers, target / base"]
    texts = [found["style"], found["masks"], f"{mean:.2f}", f"{low:.3f} to {high:.3f}", found["direction"]]
    texts += [change(found["markers"], 1), change(found["accuracy"], 3), found["agrees"]]
    return f"| {' | '.join(texts)} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the distillation runs")
    parser.add_argument("--cases", choices=["plain", "all"], default="all", help="plain: the four styles without masks")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/preflight"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads on busy cores are many times slower at this size
    rows = []
    for style, masks in CASES if options.cases == "all" else CASES[: len(STYLES)]:
        rows.append(run(style, masks, options.seeds, options.output_dir))
        print(as_row(rows[-1]), end="", flush=True)
        (options.output_dir / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        table = HEADER + "".join(map(as_row, rows)) + "\n" + agreement(rows)
        (options.output_dir / "table.md").write_text(table, encoding="utf-8")
    print("\n" + agreement(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
