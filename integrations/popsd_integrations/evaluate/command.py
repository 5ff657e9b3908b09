"""``popsd evaluate``: options, the checks before anything is generated, and the order of the work."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from popsd_integrations.evaluate.settings import ENGINES, SamplingConfig, Task, seed_of

BATCH_SIZES = {"transformers": 8, "vllm": 384}
_PLAIN = ("model", "engine", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "question_template")
_WITH_NEW_COMPLETIONS = ("adapters", "benchmarks", "samples", "batch_size", "engine_kwargs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options have the names that ``popsd train`` gives them. None means: not given."""
    usual = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}
    add = parser.add_argument
    add("--model", help="hub name or local folder of the base model")
    add("--adapters", nargs="+", help="trained checkpoints, or folders with checkpoint-… in them; path or label=path")
    add(
        "--benchmarks", nargs="+", help="aime24, aime25, hmmt25, hub names, folders or .jsonl files; name or label=name"
    )
    add("--from", dest="source", type=Path, metavar="GENERATIONS", help="judge this generations.jsonl again instead")
    add("--output_dir", type=Path, help="where files go, and where a killed run goes on (runs/evaluate)")
    add("--samples", type=int, help="completions of each problem (12; 1 at temperature 0)")
    add("--engine", choices=ENGINES, help=f"who generates ({usual['engine']})")
    add("--temperature", type=float, help=f"0 is greedy ({usual['temperature']})")
    add("--top_p", type=float, help=f"1 is no filter ({usual['top_p']})")
    add("--top_k", type=int, help=f"0 is no filter ({usual['top_k']})")
    add("--max_new_tokens", type=int, help=f"per completion ({usual['max_new_tokens']})")
    add("--seed", type=int, help=f"of sampling ({usual['seed']})")
    add("--question_template", help="the prompt; holds {question} (asks for a \\boxed answer)")
    add("--system_prompt", help="a first message of every chat")
    add("--chat_template_kwargs", type=json.loads, help="JSON, such as '{\"enable_thinking\": false}'")
    add("--question_column", help="of the benchmarks (problem, question or prompt)")
    add("--answer_column", help="of the benchmarks (answer or final_answer)")
    add("--split", help="of the benchmarks (test, or train)")
    add("--scorer", default="math", help="math-verify, or your own module:function (%(default)s)")
    add("--batch_size", type=int, help="completions at a time, and the most that a kill loses (8; vllm 384)")
    add("--engine_kwargs", type=json.loads, help="JSON, for from_pretrained or vllm.LLM")


def run(options: argparse.Namespace) -> int:
    """Evaluate, print and write. Raises ValueError on bad input, before anything is generated."""
    from popsd_integrations.evaluate import report
    from popsd_integrations.evaluate.summary import summarise

    began = time.perf_counter()
    folder, records, runs, about = _again(options) if options.source else _anew(options)
    results = {
        "about": about | {"command": shlex.join(["popsd", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d %H:%M")},
        **summarise(records, runs),
    }
    results["about"]["seconds"] = round(time.perf_counter() - began, 1)
    paths = report.write(results, records, folder)
    print("\n" + report.table(results) + "\n")
    if not any(path.suffix == ".png" for path in paths):
        print("No plots: matplotlib is missing (pip install 'popsd[plots]').")
    print("Written: " + ", ".join(map(str, paths)))
    return 0


Outcome = tuple[Path, list[dict[str, Any]], dict[str, str], dict[str, Any]]
"""Where files go, records, runs of the checkpoints, and what the page says about it all."""


def _anew(options: argparse.Namespace) -> Outcome:
    """Generate what is missing, and judge it as it comes."""
    from transformers import AutoTokenizer

    from popsd_integrations.evaluate import benchmarks, checkpoints, engines, generations
    from popsd_integrations.huggingface.prompts import ContextBuilder, Problem
    from popsd_integrations.scoring import check_answer, scorer

    for name in ("model", "benchmarks"):
        if not getattr(options, name):
            raise ValueError(f"{name}: expected one; got none. Pass --{name}.")
    config = SamplingConfig(**_given(options))
    samples = options.samples or (12 if config.temperature > 0 else 1)
    size = options.batch_size or BATCH_SIZES[config.engine]
    if samples < 1 or size < 1:
        raise ValueError(f"samples, batch_size: expected at least 1; got {samples}, {size}.")
    if config.temperature == 0 and samples > 1:
        raise ValueError(f"samples: expected 1 at temperature 0, where all would be the same; got {samples}.")
    score = scorer(options.scorer)
    tasks = benchmarks.load(options.benchmarks, options.question_column, options.answer_column, options.split)
    for task in (task for problems in tasks.values() for task in problems):
        try:
            check_answer(score, task.answer)
        except ValueError as error:
            raise ValueError(f"benchmarks: problem {task.problem} of {task.benchmark}: {error}") from error
    found = checkpoints.resolve(config.model, options.adapters or [])
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    builder = ContextBuilder(tokenizer, config.contexts())
    prompts = {}
    for task in (task for problems in tasks.values() for task in problems):
        built = builder.build(Problem(task.question, task.answer))
        assert built is not None  # nothing is dropped without a limit
        prompts[task] = built.question
    longest = max(map(len, prompts.values()))
    engines.check_engine(config, found, longest)
    folder = options.output_dir or Path("runs/evaluate")
    records = generations.open_folder(folder, config, options.scorer, found, tasks)
    engine: list[engines.Engine] = []

    def make(batch: generations.Batch) -> list[dict[str, Any]]:
        if not engine:  # nothing is loaded where nothing is missing
            engine.append(engines.make_engine(config, found, tokenizer, options.engine_kwargs or {}, longest))
        first, sample = batch.rows[0]
        wanted: dict[Task, list[int]] = {}
        for task, number in batch.rows:
            wanted.setdefault(task, []).append(number)
        requests = [
            engines.Request(prompts[task], len(numbers), seed_of(config.seed, task.benchmark, task.problem, numbers[0]))
            for task, numbers in wanted.items()
        ]
        seed = seed_of(config.seed, first.benchmark, first.problem, sample)
        made = engine[0].generate(batch.checkpoint, requests, seed)
        completions = (completion for row in made for completion in row)
        return [
            _record(batch.checkpoint.label, task, number, completion) | score(completion.text, task.answer)._asdict()
            for (task, number), completion in zip(batch.rows, completions, strict=True)
        ]

    batches, path = generations.plan(found, tasks, samples, size), folder / generations.FILE
    known, todo = generations.missing(path, records, batches)
    tokens, began = 0, time.perf_counter()
    with _bar(sum(len(batch.rows) for batch in todo), "evaluate") as bar:
        for batch in todo:
            bar.set_postfix_str(f"{batch.checkpoint.label}, {tokens / (time.perf_counter() - began):.0f} tokens/s")
            made = make(batch)
            generations.append(path, made)
            known |= {generations.key(record): record for record in made}
            tokens += sum(record["tokens"] for record in made)
            bar.update(len(made))
    done = [known[key] for batch in batches for key in batch.keys]
    about = {
        "settings": config.plain(),
        "scorer": options.scorer,
        "prompt": tokenizer.decode(next(iter(prompts.values()))),
    }
    about["checkpoints"] = {x.label: x.path for x in found}
    return folder, done, {x.label: x.run for x in found}, about


def _again(options: argparse.Namespace) -> Outcome:
    """Judge completions that are there."""
    from popsd_integrations.evaluate import generations
    from popsd_integrations.evaluate.summary import group
    from popsd_integrations.scoring import check_answer, scorer

    unused = [name for name in _WITH_NEW_COMPLETIONS if getattr(options, name) is not None]
    if unused:
        raise ValueError(f"--from: expected no {', '.join(unused)}: nothing is generated. Leave it out.")
    kept = generations.read_settings(options.source.parent)
    generations.check_same(kept, SamplingConfig(**{**kept["settings"], **_given(options)}), options.source.parent)
    records = generations.read(options.source)
    group(records)
    score = scorer(options.scorer)
    for answer in dict.fromkeys(record["expected"] for record in records):
        check_answer(score, answer)
    judged = []
    with _bar(len(records), "judge") as bar:
        for record in records:
            judged.append(record | score(record["text"], record["expected"])._asdict())
            bar.update()
    folder = options.output_dir or options.source.parent
    folder.mkdir(parents=True, exist_ok=True)
    generations.write(folder / generations.FILE, judged)
    (folder / generations.SETTINGS).write_text(
        json.dumps(kept | {"scorer": options.scorer}, indent=1), encoding="utf-8"
    )
    runs = {label: checkpoint["run"] for label, checkpoint in kept["checkpoints"].items()}
    about = {"settings": kept["settings"], "scorer": options.scorer, "prompt": None}
    about["checkpoints"] = {label: checkpoint["path"] for label, checkpoint in kept["checkpoints"].items()}
    return folder, judged, runs, about


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = (*_PLAIN, "system_prompt", "chat_template_kwargs")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _record(label: str, task: Task, sample: int, completion: Any) -> dict[str, Any]:
    return {
        "model": label,
        "benchmark": task.benchmark,
        "problem": task.problem,
        "sample": sample,
        "question": task.question,
        "expected": task.answer,
        **completion._asdict(),
    }


def _bar(total: int, name: str) -> Any:
    """A bar over completions, with the time left."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0  # a bar redrawn on a terminal is a line each time in a log file
    return tqdm(total=total, desc=name, unit="completion", mininterval=interval, disable=total == 0)
