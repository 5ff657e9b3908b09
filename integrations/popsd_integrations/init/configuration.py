"""The file: options chosen after a look at the model and the data, each with the reason beside it.

What is said of model and data comes from the functions of the dry run, and the file is read by the trainer's own parser before
it is written.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from trl import get_peft_config

from popsd_integrations.commandline.devices import device_named
from popsd_integrations.commandline.places import loading
from popsd_integrations.huggingface.sampling import position_limit
from popsd_integrations.init.columns import Columns, chosen_columns
from popsd_integrations.init.page import Page
from popsd_integrations.trl_trainer.command import load_data, load_splits, read_options, split_of
from popsd_integrations.trl_trainer.dataset import tokenizer_of
from popsd_integrations.trl_trainer.dry_run import (
    describe_counted,
    describe_prompts,
    describe_tokens,
    look,
    memory_plan,
    student_without_weights,
)

STEP, ROWS, COMPLETION, MAX_STEPS = 32, 4, 1024, 200
"""Problems per step, rows at a time, tokens per completion and steps of the recipe of arXiv 2607.02234."""


def configuration(options: argparse.Namespace) -> tuple[str, str]:
    """The text of the file, and the prompts of the first example. options: of ``popsd init``.

    Raises ValueError on bad input.
    """
    data = ["--dataset_name", options.dataset_name]
    data += ["--dataset_config", options.dataset_config] if options.dataset_config else []
    script, args, *_ = read_options(["--model_name_or_path", options.model_name_or_path, *data], trains=False)
    script.dataset_train_split = options.dataset_train_split or "train"
    splits = load_splits(script)
    if options.dataset_train_split is None and "train" not in splits and len(splits) == 1:
        (script.dataset_train_split,) = splits
    rows = split_of(splits, script.dataset_train_split, "dataset_train_split")
    if not len(rows):
        raise ValueError(f"dataset_name: expected at least one row in {script.dataset_train_split!r}; got none.")
    columns = chosen_columns(rows.column_names, options.prompt_column, options.solution_column)
    with loading(options.model_name_or_path):
        student = student_without_weights(options.model_name_or_path, args)
        tokenizer = tokenizer_of(None, options.model_name_or_path, args)
    made = Made(options, script.dataset_train_split, list(splits), columns, rows, student, tokenizer)
    return _written(made)


class Made(NamedTuple):
    """What the file is made of."""

    options: argparse.Namespace
    split: str
    splits: list[str]
    columns: Columns
    rows: Any
    student: Any
    tokenizer: Any

    @property
    def on_cpu(self) -> bool:
        """Whether the file is for this machine, which has no accelerator."""
        return self.options.device is None and not torch.accelerator.is_available()


def _written(made: Made) -> tuple[str, str]:
    """Read by the trainer's parser with one problem per step, then with as many as the rows that stay allow."""
    trial = _text(made, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.yaml"
        path.write_text(trial, encoding="utf-8")
        script, args, model_args, mixture = read_options(["--config", str(path)], trains=False)
    data = {"train_dataset": load_data(script, mixture, args.seed)[made.split], "eval_dataset": None}
    looked = look(made.options.model_name_or_path, args, data)
    _, counted = looked.check.kept(looked.data["train_dataset"], "train_dataset")
    used = len(counted.lengths)
    args.per_device_train_batch_size = min(ROWS, used)
    args.gradient_accumulation_steps = max(1, min(STEP, used) // args.per_device_train_batch_size)
    facts = {
        "tokens": describe_tokens(looked.student, looked.tokenizer, args),
        "rows": describe_counted(counted, args),
        "memory": memory_plan(looked.student, args, get_peft_config(model_args), device_named(made.options.device)),
    }
    prompts = describe_prompts(looked.data["train_dataset"][0], looked.tokenizer, args)
    facts["prompts"] = "\n".join(x.removeprefix("=== ") for x in prompts.splitlines() if x.startswith("=== "))
    batch = {x: getattr(args, x) for x in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    return _text(made, batch, facts), prompts


def _text(made: Made, batch: dict[str, int], facts: dict[str, str]) -> str:
    page, limit = Page(), position_limit(made.student)
    longest = COMPLETION if limit is None else min(COMPLETION, max(1, limit // 2))
    _data(page, made, facts, None if limit is None else limit - longest)
    _method(page, made, facts)
    _steps(page, made, facts, batch | {"max_steps": MAX_STEPS, "max_completion_length": longest})
    _logs(page, made)
    return page.text()


def _data(page: Page, made: Made, facts: dict[str, str], longest_prompt: int | None) -> None:
    options, columns = made.options, made.columns
    model = options.model_name_or_path
    page.note(f"popsd train --config FILE, for {model} on {options.dataset_name}; written by popsd init.")
    page.note("popsd train --help says what the options are; whatever is not here has its default.")
    page.line("model_name_or_path", model)
    run = f"runs/{Path(model.rstrip('/')).name}-purified"
    page.line("output_dir", run, "checkpoints, metrics, report; the same command resumes")
    page.section("data", f"columns of the split {made.split!r}: {', '.join(made.rows.column_names)}")
    page.line("dataset_name", options.dataset_name)
    if options.dataset_config:
        page.line("dataset_config", options.dataset_config)
    if made.split != "train":
        page.line("dataset_train_split", made.split)
    page.line("prompt_column", columns.prompt, "the question, which the student sees")
    page.line("solution_column", columns.solution, "the reference solution, which only the teachers see")
    if isinstance(made.rows[0][columns.prompt], str) and made.tokenizer.chat_template:
        page.line("text_as_conversation", True, "questions given as text take the chat template")
    if longest_prompt is not None:
        page.line("max_prompt_length", longest_prompt, "what the model's positions leave beside a completion")
        page.line("on_overflow", "drop", "or truncate, which cuts the solution and never the question")
    page.facts(facts.get("rows"))


def _method(page: Page, made: Made, facts: dict[str, str]) -> None:
    head, tokens = made.student.config.get_text_config().vocab_size, len(made.tokenizer)
    page.section("method", "arXiv 2607.02234")
    page.line("loss_target", "purified", "or opsd, to compare")
    page.line("beta", 0.5, "0 is forward KL, 0.5 the symmetric JSD, 1 reverse KL")
    if head > tokens:
        page.line("vocab_size", tokens, f"the tokens there are; {head - tokens} of the head's {head} rows are padding")
    if "enable_thinking" in str(made.tokenizer.chat_template or ""):
        why = "the student; OPSD's author saw thinking students do worse"
        page.line("chat_template_kwargs", {"enable_thinking": False}, why)
        page.line("teacher_chat_template_kwargs", {"enable_thinking": True})
    page.facts(facts.get("prompts"))
    page.facts(facts.get("tokens"))
    page.section("LoRA", "the frozen distributions are the model with the adapter off, which costs no memory")
    page.lines_of({"use_peft": True, "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0})
    page.lines_of({"lora_target_modules": ["all-linear"], "learning_rate": 5e-6})
    page.lines_of({"lr_scheduler_type": "constant", "max_grad_norm": 0.1})


def _steps(page: Page, made: Made, facts: dict[str, str], steps: dict[str, int]) -> None:
    page.section("steps", f"{STEP} completions per step where there are as many problems; lower the first for memory")
    page.lines_of(steps | {"temperature": 1.1, "top_p": 0.95, "top_k": 20})
    if made.on_cpu:
        page.note("No GPU was here when this was written. On one: bf16 true, dtype bfloat16, and no use_cpu.")
        page.lines_of({"use_cpu": True, "bf16": False, "dtype": "float32"})
    else:
        page.lines_of({"bf16": True, "dtype": "bfloat16"})
    page.facts(facts.get("memory"))


def _logs(page: Page, made: Made) -> None:
    page.section("logs and evaluation", "report_to: wandb, tensorboard or trackio sends them on")
    page.lines_of({"logging_steps": 1, "save_steps": 50, "report_to": "none"})
    page.note("Accuracy on held-out problems, while it trains; take the '#' away.")
    if made.columns.answer is None:
        page.note("It needs a column with the answers alone, or solutions with \\boxed{} in them.")
    test = next((x for x in ("test", "validation", "val", "dev") if x in made.splits and x != made.split), None)
    page.ideas({"test_split_size": 0.05} if test is None else {"dataset_test_split": test})
    page.ideas({"eval_strategy": "steps", "eval_steps": 50, "eval_scorer": "math"})
    page.ideas({"answer_column": made.columns.answer or made.columns.solution, "eval_problems": 64})
