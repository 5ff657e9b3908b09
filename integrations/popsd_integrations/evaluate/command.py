"""``popsd evaluate``: options, the checks before anything is generated, and the order of the work."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from popsd_integrations.commandline.kinds import boolean, json_object
from popsd_integrations.commandline.places import check_folder, check_model, is_path, loading
from popsd_integrations.evaluate.settings import ENGINES, FILE, SamplingConfig, Task, labelled, seed_of
from popsd_integrations.run_folder import exclusive

if TYPE_CHECKING:  # the command line reads its options before it imports torch
    from popsd_integrations.evaluate.checkpoints import Checkpoint
    from popsd_integrations.evaluate.engines import Engine
    from popsd_integrations.evaluate.generations import Batch
    from popsd_integrations.scoring import Scorer

BATCH_SIZES = {"transformers": 8, "vllm": 384}
_PLAIN = ("temperature", "top_p", "top_k", "max_completion_length", "seed", "question_template")
_WITH_NEW_COMPLETIONS = (
    *("adapters", "benchmarks", "prompt_column", "answer_column", "dataset_test_split"),
    *("num_generations", "per_device_eval_batch_size", "model_init_kwargs"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options have the names that ``popsd train`` gives them. None means: not given."""
    usual = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}
    parser.usage = "%(prog)s --model_name_or_path MODEL --benchmarks NAME ... [option value ...]"
    add = parser.add_argument_group("Models and problems").add_argument
    add("--model_name_or_path", help="name on the Hub or local folder of the base model")
    add("--adapters", nargs="+", help="trained checkpoints, or folders with checkpoint-… in them; path or label=path")
    add("--benchmarks", nargs="+", help="aime24, aime25, hmmt25, hub names, folders, .jsonl files; name or label=name")
    add("--prompt_column", help="of the benchmarks (problem, question or prompt)")
    add("--answer_column", help="of the benchmarks (answer or final_answer)")
    add("--dataset_test_split", help="of the benchmarks (test, or train)")
    add = parser.add_argument_group("Sampling").add_argument
    add("--num_generations", type=int, help="of each problem (12; 1 at temperature 0)")
    add("--temperature", type=float, help=f"0 is greedy ({usual['temperature']})")
    add("--top_p", type=float, help=f"1 is no filter ({usual['top_p']})")
    add("--top_k", type=int, help=f"0 is no filter ({usual['top_k']})")
    add("--max_completion_length", type=int, help=f"in tokens ({usual['max_completion_length']})")
    add("--seed", type=int, help=f"of sampling ({usual['seed']})")
    add("--question_template", help="the prompt; holds {question} (asks for a \\boxed answer)")
    add("--system_prompt", help="a first message of every chat")
    add("--chat_template_kwargs", type=json_object, help="such as '{\"enable_thinking\": false}'")
    add = parser.add_argument_group("Engine").add_argument
    add("--use_vllm", nargs="?", const=True, type=boolean, help="vLLM generates, and not transformers")
    add("--model_init_kwargs", type=json_object, help="for from_pretrained or vllm.LLM, such as the dtype")
    batch = "completions at a time, and the most that a kill loses (8; with vLLM 384)"
    add("--per_device_eval_batch_size", type=int, help=batch)
    add = parser.add_argument_group("Judging and files").add_argument
    add("--eval_scorer", default="math", help="math-verify, or your own module:function (%(default)s)")
    add("--from", dest="source", type=Path, metavar="GENERATIONS", help="judge this generations.jsonl again instead")
    add("--output_dir", type=Path, help="where files go, and where a killed run goes on (runs/evaluate)")


def run(options: argparse.Namespace) -> int:
    """Evaluate, print and write. Raises ValueError on bad input, before anything is generated."""
    _check_given(options)
    from popsd_integrations.evaluate import report
    from popsd_integrations.evaluate.summary import summarise

    began = time.perf_counter()
    outcome = _again(options) if options.source else _anew(options)
    run_by = {"command": shlex.join(["popsd", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d %H:%M")}
    run_by["seconds"] = f"{time.perf_counter() - began:.1f}"
    results = {"about": outcome.about | run_by, **summarise(outcome.records, outcome.runs)}
    paths = report.write(results, outcome.records, outcome.folder)
    print("\n" + report.table(results) + "\n")
    if outcome.about.get("missing"):
        print(f"This is a part of the evaluation. Missing are {outcome.about['missing']}.")
    if not any(path.suffix == ".png" for path in paths):
        print("No plots: matplotlib is missing (pip install 'popsd[plots]').")
    print("Written: " + ", ".join(map(str, paths)))
    return 0


def _check_given(options: argparse.Namespace) -> None:
    """Raise ValueError for what the options alone show, before anything is imported that takes time."""
    if options.output_dir is not None:
        check_folder("output_dir", options.output_dir)
    if options.source:
        unused = [name for name in _WITH_NEW_COMPLETIONS if getattr(options, name) is not None]
        if unused:
            raise ValueError(f"--from: expected no {', '.join(unused)}: nothing is generated. Leave it out.")
        if not options.source.is_file():
            raise ValueError(f"--from: expected a {FILE}; there is no file {options.source}.")
        return
    for name in ("model_name_or_path", "benchmarks"):
        if not getattr(options, name):
            raise ValueError(f"{name}: expected one; got none. Pass --{name}.")
    check_model(options.model_name_or_path)
    for name in options.benchmarks:
        path = Path(labelled(name, "")[1])
        if (path.suffix in (".jsonl", ".json") or is_path(str(path))) and not path.exists():
            raise ValueError(f"benchmarks: expected a file; there is none at {path}.")
    for name in options.adapters or []:
        path = Path(labelled(name, "")[1])
        if is_path(str(path)) and not path.is_dir():
            raise ValueError(
                f"adapters: expected a local folder or a name on the Hub; there is no folder {str(path)!r}."
            )
    for name in ("num_generations", "per_device_eval_batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1; got {getattr(options, name)}.")


class Outcome(NamedTuple):
    """Where files go, the records, the runs of the checkpoints, and what the page says about it all."""

    folder: Path
    records: list[dict[str, Any]]
    runs: dict[str, str]
    about: dict[str, Any]


class Job(NamedTuple):
    """What is to be generated, with everything checked. prompts: token ids of each task."""

    config: SamplingConfig
    samples: int
    batch_size: int
    score: Scorer
    tasks: dict[str, list[Task]]
    checkpoints: list[Checkpoint]
    tokenizer: Any
    prompts: dict[Task, list[int]]

    @property
    def longest_prompt(self) -> int:
        return max(map(len, self.prompts.values()))


def _checked(options: argparse.Namespace) -> Job:
    from transformers import AutoTokenizer

    from popsd_integrations.evaluate import benchmarks, checkpoints, engines
    from popsd_integrations.huggingface.prompts import ContextBuilder, Problem
    from popsd_integrations.scoring import check_answer, scorer

    config = SamplingConfig(**_given(options))
    samples = (12 if config.temperature > 0 else 1) if options.num_generations is None else options.num_generations
    size = (
        BATCH_SIZES[config.engine] if options.per_device_eval_batch_size is None else options.per_device_eval_batch_size
    )
    if config.temperature == 0 and samples > 1:
        raise ValueError(f"num_generations: expected 1 at temperature 0, where all would be the same; got {samples}.")
    score = scorer(options.eval_scorer)
    tasks = benchmarks.load(
        options.benchmarks, options.prompt_column, options.answer_column, options.dataset_test_split
    )
    for task in (task for problems in tasks.values() for task in problems):
        try:
            check_answer(score, task.answer)
        except ValueError as error:
            raise ValueError(f"benchmarks: problem {task.problem} of {task.benchmark}: {error}") from error
    found = checkpoints.resolve(config.model, options.adapters or [])
    same = {
        name: config.model_init_kwargs[name]
        for name in ("revision", "trust_remote_code")
        if name in config.model_init_kwargs
    }
    with loading(config.model):
        tokenizer = AutoTokenizer.from_pretrained(config.model, **same)
    builder, prompts = ContextBuilder(tokenizer, config.contexts()), {}
    for task in (task for problems in tasks.values() for task in problems):
        built = builder.build(Problem(task.question, task.answer))
        assert built is not None  # nothing is dropped without a limit
        prompts[task] = built.question
    job = Job(config, samples, size, score, tasks, found, tokenizer, prompts)
    engines.check_engine(config, found, job.longest_prompt)
    return job


def _anew(options: argparse.Namespace) -> Outcome:
    """Generate what is missing, and judge it as it comes. Raises ValueError where another evaluation is in the folder."""
    job = _checked(options)
    with exclusive(options.output_dir or Path("runs/evaluate")) as folder:
        return _generated(job, options, folder)


def _generated(job: Job, options: argparse.Namespace, folder: Path) -> Outcome:
    from popsd_integrations.evaluate import engines, generations

    records = generations.open_folder(folder, job.config, options.eval_scorer, job.checkpoints, job.tasks, job.samples)
    batches = generations.plan(job.checkpoints, job.tasks, job.samples, job.batch_size)
    path = folder / FILE
    known, todo = generations.missing(path, records, batches)
    if todo:
        engine = engines.make_engine(
            job.config, job.checkpoints, job.tokenizer, dict(job.config.model_init_kwargs), job.longest_prompt
        )
    tokens, began = 0, time.perf_counter()
    with _bar(sum(len(batch.rows) for batch in todo), "evaluate") as bar:
        for batch in todo:
            bar.set_postfix_str(f"{batch.checkpoint.label}, {tokens / (time.perf_counter() - began):.0f} tokens/s")
            with loading(batch.checkpoint.path):
                made = _make(job, engine, batch)
            generations.append(path, made)
            known |= {generations.key(record): record for record in made}
            tokens += sum(record["tokens"] for record in made)
            bar.update(len(made))
    about = {
        "settings": job.config.plain(),
        "scorer": options.eval_scorer,
        "prompt": job.tokenizer.decode(next(iter(job.prompts.values()))),
        "checkpoints": {checkpoint.label: checkpoint.path for checkpoint in job.checkpoints},
    }
    runs = {checkpoint.label: checkpoint.run for checkpoint in job.checkpoints}
    return Outcome(folder, [known[key] for batch in batches for key in batch.keys], runs, about)


def _make(job: Job, engine: Engine, batch: Batch) -> list[dict[str, Any]]:
    """The records of a batch. Its seeds depend on its place alone, and are the same for every checkpoint."""
    from popsd_integrations.evaluate.engines import Request

    wanted: dict[Task, list[int]] = {}
    for task, sample in batch.rows:
        wanted.setdefault(task, []).append(sample)
    seeds = [seed_of(job.config.seed, task.benchmark, task.problem, samples[0]) for task, samples in wanted.items()]
    requests = [
        Request(job.prompts[task], len(samples), seed)
        for (task, samples), seed in zip(wanted.items(), seeds, strict=True)
    ]
    made = engine.generate(batch.checkpoint, requests, seeds[0])
    completions = [completion for row in made for completion in row]
    return [
        _record(batch.checkpoint.label, task, sample, completion) | job.score(completion.text, task.answer)._asdict()
        for (task, sample), completion in zip(batch.rows, completions, strict=True)
    ]


def _again(options: argparse.Namespace) -> Outcome:
    """Judge completions that are there."""
    from popsd_integrations.evaluate import generations
    from popsd_integrations.evaluate.summary import group
    from popsd_integrations.scoring import check_answer, scorer, scorer_code

    score = scorer(options.eval_scorer)
    with exclusive(
        options.output_dir or options.source.parent
    ) as folder:  # nobody adds lines between reading and writing
        path = folder / FILE
        if path.exists() and not path.samefile(options.source):
            raise ValueError(
                f"output_dir: expected a folder without another evaluation; got {folder}, whose {path.name} is not "
                f"{options.source} and would be overwritten. Pass another output_dir."
            )
        kept = generations.read_settings(options.source.parent)
        generations.check_same(kept, SamplingConfig(**{**kept["settings"], **_given(options)}), options.source.parent)
        records = generations.read(options.source)
        missing = generations.describe_missing(kept, records)
        try:
            group(records)
        except ValueError as error:
            raise ValueError(f"{error} Missing are {missing}." if missing else str(error)) from error
        for answer in dict.fromkeys(record["expected"] for record in records):
            check_answer(score, answer)
        judged = []
        with _bar(len(records), "judge") as bar:
            for record in records:
                judged.append(record | score(record["text"], record["expected"])._asdict())
                bar.update()
        generations.write(path, judged)
        generations.write_settings(
            folder, kept | {"scorer": options.eval_scorer, "scorer_code": scorer_code(options.eval_scorer)}
        )
    checkpoints = kept["checkpoints"]
    about = {
        "settings": kept["settings"],
        "scorer": options.eval_scorer,
        "prompt": None,
        "missing": missing,
        "checkpoints": {label: checkpoint["path"] for label, checkpoint in checkpoints.items()},
    }
    return Outcome(folder, judged, {label: checkpoint["run"] for label, checkpoint in checkpoints.items()}, about)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = (*_PLAIN, "system_prompt", "chat_template_kwargs", "model_init_kwargs")
    given = {name: getattr(options, name) for name in names} | {"model": options.model_name_or_path}
    given["engine"] = None if options.use_vllm is None else ENGINES[options.use_vllm]
    return {name: value for name, value in given.items() if value is not None}


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
