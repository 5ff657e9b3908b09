"""``popsd diagnose``: what a training configuration would teach, or the miniature; prints a sentence and a table."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from popsd_integrations.commandline.places import check_folder

if TYPE_CHECKING:  # the command line reads its options before it imports torch
    from popsd_integrations.diagnose.settings import Setting

MINIATURE_MARKERS = ("maybe", "check", "wait")
HELP = """\
All options of popsd train are taken too, and mean the same: with --config train.yaml, what that file will train is measured
(see popsd train --help). Without any of them, the miniature of popsd demo."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``popsd train`` has not; its own are left over, and read by its own parser."""
    parser.epilog = HELP
    parser.add_argument(
        "--diagnose_problems", type=int, help="random rows, with one completion sampled of each (32; miniature 256)"
    )
    parser.add_argument("--diagnose_dir", type=Path, help="where files go (diagnose in output_dir; runs/diagnose)")
    parser.add_argument("--cache_dir", type=Path, help="where warm-ups of the miniature are kept (XDG cache, popsd/)")


def run(options: argparse.Namespace, cache_dir: Path) -> int:
    """Diagnose, print and write. options.rest: those of ``popsd train``. Raises ValueError on bad input."""
    from popsd_integrations.diagnose import report
    from popsd_integrations.diagnose.measure import diagnose

    if options.diagnose_problems is not None and options.diagnose_problems < 1:
        raise ValueError(f"diagnose_problems: expected at least 1; got {options.diagnose_problems}.")
    for name in ("diagnose_dir", "cache_dir"):
        if (folder := getattr(options, name)) is not None:
            check_folder(name, folder)
    if options.rest:
        from popsd_integrations.diagnose import training

        if options.cache_dir is not None:
            raise ValueError("cache_dir: expected none with a model to measure; it is of the miniature. Leave it out.")
        setting = training.read(options.rest, options.diagnose_problems or 32, options.diagnose_dir)
    else:
        setting = _miniature(options.diagnose_problems or 256, cache_dir, options.diagnose_dir or Path("runs/diagnose"))
    found = diagnose(
        setting.model,
        setting.tokenizer,
        setting.prompts,
        setting.config,
        generate=setting.generate,
        token_weights=setting.token_weights,
    )
    about = {"Command": shlex.join(["popsd", *sys.argv[1:]]), "Date": time.strftime("%Y-%m-%d %H:%M")}
    found = dataclasses.replace(found, about={**setting.about, **about})
    paths = report.write(found, setting.folder)
    print(f"\n{found.sentence}\n\n{report.table(found)}\n")
    if not any(path.suffix == ".png" for path in paths):
        print("No plots: matplotlib is missing (pip install 'popsd[plots]').")
    print("Written: " + ", ".join(map(str, paths)))
    return 0


def _miniature(completions: int, cache_dir: Path, folder: Path) -> Setting:
    import torch

    from popsd.markers import EpistemicMarkers
    from popsd_integrations.diagnose.measure import DiagnoseConfig
    from popsd_integrations.diagnose.settings import Setting
    from popsd_integrations.huggingface.prompts import ContextBuilder
    from popsd_integrations.miniature.sampler import sample
    from popsd_integrations.miniature.task import MAX_NEW_TOKENS, MINIATURE_CONTEXTS, draw_puzzles
    from popsd_integrations.miniature.tokenizer import build_tokenizer
    from popsd_integrations.miniature.warmup import WarmupConfig, warm_up

    torch.set_num_threads(1)  # at this size two threads on busy cores were 4 to 27 times slower
    print("Without a model: the miniature of popsd demo, after its warm-up (about a minute, then kept).")
    model, tokenizer = warm_up(WarmupConfig(), cache_dir), build_tokenizer()
    problems = [puzzle.problem for puzzle in draw_puzzles(completions, "test", seed=0)]
    prompts = ContextBuilder(tokenizer, MINIATURE_CONTEXTS).build_all(problems)
    config = DiagnoseConfig(
        completions=completions,
        max_new_tokens=MAX_NEW_TOKENS,
        markers=EpistemicMarkers(MINIATURE_MARKERS),
        batch_size=64,
    )
    about = {
        "Model": "the miniature of popsd demo after its warm-up",
        "Data": f"{completions} puzzles of its test set, drawn with seed 0",
        "Target": f"loss_target {config.loss_target}, {config.loss}",
        "Sampling": f"temperature {config.temperature}, at most {config.max_new_tokens} tokens, seed {config.seed}",
    }
    return Setting(model, tokenizer, prompts, config, folder, about, sample)
