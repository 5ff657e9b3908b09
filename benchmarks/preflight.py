"""Does the pre-flight check predict what training does? The miniature in four styles of data, and masks where it fails.

    python benchmarks/preflight.py [--seeds 0 1 --cases plain --output-dir runs/preflight]

For each case: warm up, diagnose the base model (`popsd diagnose`), then train on the purified target for 50 steps, and set
the change of the markers' probability beside the markers before and after. The table goes to stdout and to table.md.
About two CPU minutes for each style and half a minute for each further run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from popsd import PurifiedConfig
from popsd.markers import EpistemicMarkers
from popsd_integrations.diagnose.measure import DiagnoseConfig, diagnose
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.miniature import task
from popsd_integrations.miniature.evaluate import evaluate
from popsd_integrations.miniature.experiment import ExperimentConfig, distil
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.tokenizer import TOKEN_ID, build_tokenizer
from popsd_integrations.miniature.warmup import warm_up

MARKERS = EpistemicMarkers(("maybe", "check", "wait"))


class Style(NamedTuple):
    """P(a try is terse) of teacher and of the reference-only probe; whether terse tries begin with a token of their own."""

    teacher: float
    reference: float
    token: bool = True


STYLES = {
    "probe terser": Style(0.6, 0.8),
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
CASES += [("probe terser", "plausibility 0.3"), ("teacher terser", "plausibility 0.3")]


@contextmanager
def data_of(style: Style) -> Iterator[None]:
    """The miniature's data written in this style."""
    styles, write = dict(task.STYLES), task.write_completion
    task.STYLES["teacher"] = styles["teacher"]._replace(terse=style.teacher)
    task.STYLES["reference"] = styles["reference"]._replace(terse=style.reference)
    if not style.token:
        task.write_completion = lambda *a: [token for token in write(*a) if token != TOKEN_ID["SO"]]
    try:
        yield
    finally:
        task.STYLES.update(styles)
        task.write_completion = write


def run(style: str, masks: str, seeds: list[int], folder: Path) -> dict[str, Any]:
    config = ExperimentConfig(loss=PurifiedConfig(**MASKS[masks]))
    cache = folder / ("warm-up" if STYLES[style].token else "warm-up-no-token")
    name = f"{style}-{masks}".replace(" ", "_")
    with data_of(STYLES[style]):
        model, tokenizer = warm_up(config.warmup, cache), build_tokenizer()
        test = task.draw_puzzles(config.test_puzzles, "test", seed=0)
        problems = [puzzle.problem for puzzle in task.draw_puzzles(256, "train", seed=1000)]
        prompts = ContextBuilder(tokenizer, task.MINIATURE_CONTEXTS).build_all(problems)
        options = DiagnoseConfig(
            completions=256, batch_size=64, max_new_tokens=task.MAX_NEW_TOKENS, loss=config.loss, markers=MARKERS
        )
        found = diagnose(model, tokenizer, prompts, options, generate=sample, progress=False)
        before = evaluate(model, test)
        ends = [distil(config, "purified", seed, folder / f"{name}-{seed}", cache)[-1] for seed in seeds]
    markers = [end["eval/markers"] for end in ends]
    after = sum(markers) / len(markers)
    return {
        "style": style,
        "masks": masks,
        "change": found.change,
        "direction": found.direction,
        "markers": [before.markers, *markers],
        "accuracy": [before.accuracy, *(end["eval/accuracy"] for end in ends)],
        "agrees": found.direction
        == ("raise" if after > 1.1 * before.markers else "lower" if after < 0.9 * before.markers else "keep"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| data | masks on entries | target / base | pre-flight | markers per completion | accuracy, T = 1 | agrees |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (before, *after), (accuracy, *reached) = row["markers"], row["accuracy"]
        lines.append(
            f"| {row['style']} | {row['masks']} | {row['change']:.2f} | {row['direction']} "
            f"| {before:.1f} → {', '.join(f'{x:.1f}' for x in after)} "
            f"| {accuracy:.3f} → {', '.join(f'{x:.3f}' for x in reached)} | {'yes' if row['agrees'] else 'no'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the distillation runs")
    parser.add_argument("--cases", choices=["plain", "all"], default="all", help="plain: the four styles without masks")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/preflight"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads on busy cores are many times slower at this size
    rows = []
    for style, masks in CASES:
        if masks == "none" or options.cases == "all":
            rows.append(run(style, masks, options.seeds, options.output_dir))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            (options.output_dir / "rows.json").write_text(json.dumps(rows, indent=1))
            (options.output_dir / "table.md").write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
