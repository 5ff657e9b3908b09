"""``popsd diagnose``: reads a model and problems (by default the miniature's), prints sentence and table, writes files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the command line reads its options before it imports torch
    from popsd_integrations.huggingface.prompts import Problem, Prompts

MINIATURE_MARKERS = ("maybe", "check", "wait")


class Setting(NamedTuple):
    model: Any
    tokenizer: Any
    prompts: list[Prompts]
    markers: tuple[str, ...]
    max_new_tokens: int
    generate: Callable[..., list[list[int]]] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub name or local path; without it the miniature of popsd demo")
    parser.add_argument("--dataset", help="hub name, folder, or .jsonl/.json file with questions and solutions")
    parser.add_argument("--split", default="train", help="of the dataset (%(default)s)")
    parser.add_argument("--question-column", default="prompt", help="(%(default)s)")
    parser.add_argument("--solution-column", default="solution", help="(%(default)s)")
    parser.add_argument("--markers", nargs="+", help="words to look for (popsd's epistemic markers)")
    parser.add_argument("--completions", type=int, default=32, help="to sample (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per forward (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="per completion (512; the miniature 46)")
    parser.add_argument("--max-prompt-length", type=int, default=8192, help="tokens, in any context (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (%(default)s)")
    parser.add_argument("--pmi-beta", type=float, default=1.0, help="the paper's beta (%(default)s)")
    parser.add_argument("--pmi-clip", type=float, default=10.0, help="the paper's c (%(default)s)")
    parser.add_argument("--plausibility", type=float, help="leave entries below this share of the base's largest alone")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/diagnose"), help="where files go (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, help="where warm-ups of the miniature are kept (XDG cache, popsd/)")


def run(options: argparse.Namespace, cache_dir: Path) -> int:
    """Diagnose, print and write. Raises ValueError on bad input."""
    from popsd import PurifiedConfig
    from popsd.markers import EpistemicMarkers
    from popsd_integrations.diagnose import report
    from popsd_integrations.diagnose.measure import DiagnoseConfig, diagnose

    if (options.model is None) != (options.dataset is None):
        missing = "--model" if options.model is None else "--dataset"
        raise ValueError(
            f"{missing}: expected with the other of --model and --dataset; got none. Leave out both: miniature."
        )
    loss = PurifiedConfig(pmi_beta=options.pmi_beta, pmi_clip=options.pmi_clip, plausibility=options.plausibility)
    setting = _miniature(options, cache_dir) if options.model is None else _of_user(options)
    config = DiagnoseConfig(
        completions=options.completions,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or setting.max_new_tokens,
        temperature=options.temperature,
        loss=loss,
        markers=EpistemicMarkers(tuple(options.markers or setting.markers)),
        seed=options.seed,
    )
    diagnosis = diagnose(setting.model, setting.tokenizer, setting.prompts, config, generate=setting.generate)
    paths = report.write(diagnosis, options.output_dir)
    print(f"\n{diagnosis.sentence}\n\n{report.table(diagnosis)}\n")
    if not any(path.suffix == ".png" for path in paths):
        print("No plots: matplotlib is missing (pip install 'popsd[plots]').")
    print("Written: " + ", ".join(map(str, paths)))
    return 0


def _miniature(options: argparse.Namespace, cache_dir: Path) -> Setting:
    import torch

    from popsd_integrations.huggingface.prompts import ContextBuilder
    from popsd_integrations.miniature.sampler import sample
    from popsd_integrations.miniature.task import MAX_NEW_TOKENS, MINIATURE_CONTEXTS, draw_puzzles
    from popsd_integrations.miniature.tokenizer import build_tokenizer
    from popsd_integrations.miniature.warmup import WarmupConfig, warm_up

    torch.set_num_threads(1)  # at this size two threads on busy cores were 4 to 27 times slower
    print("Without --model: the miniature of popsd demo, after its warm-up (about a minute, then kept).")
    model, tokenizer = warm_up(WarmupConfig(), cache_dir), build_tokenizer()
    problems = [puzzle.problem for puzzle in draw_puzzles(options.completions, "test", seed=options.seed)]
    prompts = ContextBuilder(tokenizer, MINIATURE_CONTEXTS).build_all(problems)
    return Setting(model, tokenizer, prompts, MINIATURE_MARKERS, MAX_NEW_TOKENS, sample)


def _of_user(options: argparse.Namespace) -> Setting:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from popsd.markers import DEFAULT_MARKERS
    from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig

    rows = _rows(options.dataset, options.split, options.completions)
    found = problems(rows, options.question_column, options.solution_column)
    contexts = ContextConfig(max_prompt_length=options.max_prompt_length)
    loaded: dict[str, Any] = {"trust_remote_code": False}  # None would ask on the terminal
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, **loaded)
        prompts = ContextBuilder(tokenizer, contexts).build_all(found)  # before the weights are loaded
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", **loaded).eval()
    except OSError as error:
        raise ValueError(f"--model: expected a hub name or a local path; got {options.model!r} ({error}).") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Setting(model, tokenizer, prompts, DEFAULT_MARKERS, 512, None)


def problems(rows: Sequence[Mapping[str, Any]], question: str, solution: str) -> list[Problem]:
    """Problems of a dataset's rows. Raises ValueError where a column is missing or there is no row."""
    from popsd_integrations.huggingface.prompts import Problem

    if not rows:
        raise ValueError("--dataset: expected at least one row; got none. Choose another --split.")
    for option, column in (("--question-column", question), ("--solution-column", solution)):
        if column not in rows[0]:
            raise ValueError(
                f"{option}: expected one of the columns {sorted(rows[0])}; got {column!r}. Name the right one."
            )
    return [Problem(row[question], row[solution]) for row in rows]


def _rows(name: str, split: str, count: int) -> list[Mapping[str, Any]]:
    path = Path(name)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
            # Only \n ends a line: splitlines would also split at U+2028, which JSON allows inside a text.
            lines = [text] if path.suffix == ".json" else [line for line in text.split("\n") if line.strip()]
            content = [json.loads(line) for line in lines]
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(
                f"--dataset: expected JSON rows in {name}; got {error}. Write one object per line, in UTF-8."
            ) from error
        content = content[0] if path.suffix == ".json" else content
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError(f"--dataset: expected a list of objects in {name}; got something else.")
        return content[:count]
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"--dataset: expected a hub name, a folder or a .jsonl file with a split {split!r}; got {name!r} ({error})."
        ) from error
    return [dict(row) for row in dataset.select(range(min(count, len(dataset))))]
