"""Does the pre-flight check predict what training does? The miniature in four styles of data, and masks where it fails.

    python benchmarks/preflight.py [--seeds 0 1 --output-dir runs/preflight]

For each case: warm up, diagnose the base model (`popsd diagnose`), then train on the purified target for 50 steps, and set
the change of the markers' probability beside the markers before and after. The table goes to stdout and to table.md.
About two CPU minutes for each style and half a minute for each further run.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

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
CASES = [(style, "none") for style in STYLES] + [("no style token", masks) for masks in MASKS if masks != "none"]
CASES += [("probe terser", "plausibility 0.3"), ("teacher terser", "plausibility 0.3")]
HEADER = """\
| data | masks on entries | target / base | pre-flight | markers per completion | accuracy, T = 1 | agrees |
|---|---|---|---|---|---|---|
"""


def run(style: str, masks: str, seeds: list[int], folder: Path) -> str:
    """One case as a row of the table. The miniature's data are written in this style meanwhile."""
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
    counts = [before.markers, *(end["eval/markers"] for end in ends)]
    accuracy = [before.accuracy, *(end["eval/accuracy"] for end in ends)]
    growth = sum(counts[1:]) / len(ends) / before.markers
    agrees = found.direction == ("raise" if growth > 1.1 else "lower" if growth < 0.9 else "keep")

    def change(values: list[float], digits: int) -> str:
        first, *later = (f"{x:.{digits}f}" for x in values)
        return f"{first} → {', '.join(later)}"

    texts = [style, masks, f"{found.change:.2f}", found.direction, change(counts, 1), change(accuracy, 3)]
    return f"| {' | '.join(texts)} | {'yes' if agrees else 'no'} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the distillation runs")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/preflight"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads on busy cores are many times slower at this size
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with (options.output_dir / "table.md").open("w", encoding="utf-8") as table:
        table.write(HEADER)
        for style, masks in CASES:
            row = run(style, masks, options.seeds, options.output_dir)
            print(row, end="", flush=True)
            table.write(row)
            table.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
