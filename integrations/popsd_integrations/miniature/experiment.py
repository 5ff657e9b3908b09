"""The experiment: one warmed-up model, distilled with the teacher as the target (OPSD) and with the purified target.

Both use ``torch_loop.train`` and ``popsd.PurifiedOPSDLoss``, from the same weights, on the same questions in the same
order. Only ``loss_target`` differs. Each run is a process with one thread, because two threads on busy cores are 4 to 27
times slower here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from popsd import PurifiedConfig
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.miniature.evaluate import Score, evaluate, example, style_gap
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.task import MAX_NEW_TOKENS, MINIATURE_CONTEXTS, draw_puzzles
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.miniature.warmup import WarmupConfig, warm_up
from popsd_integrations.runs.report import METRICS, MODEL
from popsd_integrations.torch_loop import TrainConfig, train

Target = Literal["opsd", "purified"]
TARGETS: tuple[Target, ...] = ("opsd", "purified")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Options of the distillation runs; both targets share them all.

    num_seeds: runs per target. learning_rate: at 2e-4 OPSD collapses before step 20. lora_rank: None is full fine-tuning;
        rank 8 with a learning rate of 1e-3 gives similar results.
    test_puzzles: 384 give a standard error of 2.5 points of accuracy.
    """

    num_seeds: int = 1
    max_steps: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-4
    lora_rank: int | None = None
    evaluate_every: int = 10
    test_puzzles: int = 384
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    loss: PurifiedConfig = field(default_factory=PurifiedConfig)

    def __post_init__(self) -> None:
        for name in ("num_seeds", "max_steps", "batch_size", "test_puzzles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}.")


def run_experiment(
    config: ExperimentConfig, output_dir: Path, cache_dir: Path, *, processes: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Run everything and return the results, also written to ``output_dir/results.json``.

    output_dir: metrics and checkpoints of each run go to ``<target>-seed<seed>`` in it; a run that was killed resumes.
    cache_dir: where warm-ups are kept. processes: None is one per run, at most one per core.
    Returns base, opsd and purified (fields of ``Score``, means over seeds), standard_error, per_seed, style_gap (see
    ``evaluate.style_gap``), example (see ``evaluate.example``; of the runs with seed 0), steps (metrics of every step),
    config, seconds.
    """
    began = time.perf_counter()
    output_dir, cache_dir = Path(output_dir), Path(cache_dir)
    with _one_thread():
        with _bar("warm-up", config.warmup.cycle_steps, progress) as advance:
            model = warm_up(config.warmup, cache_dir, lambda step, loss: advance(step, f"loss {loss:.3f}"))
        warmed = time.perf_counter()
        puzzles = draw_puzzles(config.test_puzzles, "test", seed=0)
        base, gap = evaluate(model, puzzles), style_gap(model, puzzles, config.loss)
    jobs: list[tuple[Target, int]] = [(target, seed) for seed in range(config.num_seeds) for target in TARGETS]
    runs = _distil_all(config, jobs, output_dir, cache_dir, processes, progress)
    with _one_thread():
        models = {"base": model} | {x: trained(output_dir / f"{x}-seed0", config, cache_dir) for x in TARGETS}
        shown = example(models, puzzles)
    finals: dict[str, list[Score]] = {
        target: [_final_score(runs[target, seed]) for seed in range(config.num_seeds)] for target in TARGETS
    }
    results = {
        "base": base._asdict(),
        **{target: _mean(scores)._asdict() for target, scores in finals.items()},
        "standard_error": math.sqrt(base.accuracy * (1 - base.accuracy) / config.test_puzzles),
        "per_seed": {target: [score._asdict() for score in scores] for target, scores in finals.items()},
        "style_gap": gap,
        "example": shown,
        "steps": {target: [runs[target, seed] for seed in range(config.num_seeds)] for target in TARGETS},
        "config": dataclasses.asdict(config),
        "seconds": {"warm-up": warmed - began, "total": time.perf_counter() - began},
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def distil(
    config: ExperimentConfig, target: Target, seed: int, output_dir: Path, cache_dir: Path
) -> list[dict[str, float]]:
    """One run, in the calling process: metrics per step, those of evaluated steps with ``eval/<field of Score>``."""
    with _one_thread():
        model = warm_up(config.warmup, cache_dir)
        tokenizer = build_tokenizer()
        questions = draw_puzzles(config.max_steps * config.batch_size, "train", seed)
        prompts = ContextBuilder(tokenizer, MINIATURE_CONTEXTS).build_all([puzzle.problem for puzzle in questions])
        test = draw_puzzles(config.test_puzzles, "test", seed=0)
        options = TrainConfig(
            steps=config.max_steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_rank or 1,
            max_new_tokens=MAX_NEW_TOKENS,
            loss_target=target,
            loss=config.loss,
            evaluate_every=config.evaluate_every,
            checkpoint_every=10,
            seed=seed,
        )
        return train(
            model,
            tokenizer,
            prompts,
            options,
            output_dir=output_dir,
            generate=sample,
            evaluate=lambda student: evaluate(student, test)._asdict(),
            resume=True,
            progress=False,
        ).metrics


def trained(folder: Path, config: ExperimentConfig, cache_dir: Path) -> Any:
    """The model that a run left in its folder."""
    if config.lora_rank is None:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder / MODEL)
    from peft import PeftModel

    return PeftModel.from_pretrained(warm_up(config.warmup, cache_dir), folder / MODEL)


def _distil_all(
    config: ExperimentConfig,
    jobs: Sequence[tuple[Target, int]],
    output_dir: Path,
    cache_dir: Path,
    processes: int | None,
    progress: bool,
) -> dict[tuple[Target, int], list[dict[str, float]]]:
    folders = {job: output_dir / f"{job[0]}-seed{job[1]}" for job in jobs}
    workers = min(len(jobs), processes or os.cpu_count() or 1)
    with (
        _bar("distillation", config.max_steps * len(jobs), progress) as advance,
        # A forked child would inherit PyTorch's thread pools in whatever state they are.
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        futures: dict[tuple[Target, int], Future[list[dict[str, float]]]] = {
            job: pool.submit(distil, config, *job, folder, cache_dir) for job, folder in folders.items()
        }
        pending: set[Any] = set(futures.values())
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            advance(sum(_lines(folder / METRICS) for folder in folders.values()), f"{len(pending)} runs to go")
        return {job: future.result() for job, future in futures.items()}


def _final_score(metrics: list[dict[str, float]]) -> Score:
    return Score(*(metrics[-1][f"eval/{name}"] for name in Score._fields))


def _mean(scores: Sequence[Score]) -> Score:
    return Score(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _bar(name: str, total: int, shown: bool) -> Iterator[Any]:
    from tqdm import tqdm

    # A bar redrawn in place on a terminal is a line each time in a log file.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(desc=f"{name:>12}", total=total, unit="step", mininterval=interval, disable=not shown) as bar:

        def advance(done: int, note: str) -> None:
            bar.total = max(bar.total, math.ceil(done / total) * total)
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield advance
