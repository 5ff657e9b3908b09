"""``popsd train``: PurifiedOPSDTrainer from a YAML file and flags, with TRL's own argument groups.

Flags override the file, and a misspelt name is refused in both. ``--dry_run`` stops before the weights are loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from popsd_integrations.commandline.options import ANSWER_COLUMN, SOLUTION_COLUMNS, WRONG_COLUMN, DataOptions
from popsd_integrations.commandline.places import DATA_FILES, loading, no_data
from popsd_integrations.commandline.suggest import OneLine
from popsd_integrations.commandline.training import given_options, is_true
from popsd_integrations.runs.report import how_to_go_on, write_page
from popsd_integrations.trl_trainer.callbacks import newest_whole_checkpoint
from popsd_integrations.trl_trainer.dry_run import dry_run
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer


@dataclass
class TrainArguments(DataOptions, ScriptArguments):
    """Where the data is, and what to do with it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, load and train; returns 0. Raises ValueError on bad input."""
    script, args, model_args, mixture = read_options(list(sys.argv[1:] if arguments is None else arguments))
    resumed = checkpoint_to_resume(args)
    dataset = load_data(script, mixture, args.seed)
    train_dataset = split_of(dataset, script.dataset_train_split, "dataset_train_split")
    evaluated = args.eval_strategy != "no"
    eval_dataset = split_of(dataset, script.dataset_test_split, "dataset_test_split") if evaluated else None
    peft_config = get_peft_config(model_args)
    model = model_args.model_name_or_path
    if script.dry_run:
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        with loading(model):
            print("\n".join(dry_run(model, args, peft_config, data, script.device)))
        return 0
    with loading(model):
        trainer = PurifiedOPSDTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
        )
    trainer.train(resume_from_checkpoint=resumed)
    trainer.create_model_card(dataset_name=None if Path(script.dataset_name or ".").exists() else script.dataset_name)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        write_page(Path(args.output_dir))
        print("\n".join(how_to_go_on(Path(args.output_dir))))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return 0


def read_options(
    given: Sequence[str], trains: bool = True
) -> tuple[TrainArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig]:
    """The options of a command line and of the file that it names. trains: False where nothing will be trained.

    Raises ValueError for a model that is missing and options of an adapter that there is not.
    """
    dry = is_true(given_options(given, trains).get("dry_run"))
    if (dry or not trains) and not torch.accelerator.is_available():
        given = [
            *given,
            "--use_cpu",
            "true",
        ]  # transformers refuses bf16 without a GPU, and nothing will be trained here
    given = [part for text in given for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
    script, args, model_args, mixture = full_parser().parse_args_and_config(list(given))
    adapter = [option for option in fields(model_args) if option.name.startswith(("lora_", "use_dora", "use_rslora"))]
    ignored = [option.name for option in adapter if getattr(model_args, option.name) not in (option.default, None, [])]
    if ignored and not model_args.use_peft and "--use_peft" not in given:
        raise ValueError(
            f"use_peft: expected true with {', '.join(ignored)}; got false, which trains all weights. Say which."
        )
    # TRL's ModelConfig defaults to float32.
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    return script, args, model_args, mixture


class _FullParser(OneLine, TrlParser):
    """TRL's parser, whose errors are one line."""


def full_parser() -> Any:
    """The parser of all options, those of TRL and transformers with their help among them."""
    parser: Any = _FullParser
    return parser((TrainArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig), prog="popsd train")


def load_data(script: TrainArguments, mixture: Any, seed: int) -> Any:
    """Splits with the columns that the trainer takes. seed: draws the rows of test_split_size."""
    for name in ("dataset_config", "dataset_streaming"):
        if mixture.datasets and (value := getattr(script, name)):
            raise ValueError(f"{name}: expected none with datasets, where it would be ignored; got {value!r}.")
    if script.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers: expected False, since nothing here reads it; got True.")
    size, mixture.test_split_size = mixture.test_split_size, None  # TRL would draw other rows in a run that goes on
    dataset = get_dataset(mixture) if mixture.datasets else load_splits(script)
    if size is not None:
        dataset = _with_test_split(dataset, size, script, seed)
    renamed = {script.prompt_column: "prompt"}
    if script.solution_column is not None:
        renamed[script.solution_column] = SOLUTION_COLUMNS[0]
    if script.wrong_solution_column != WRONG_COLUMN:
        renamed[script.wrong_solution_column] = WRONG_COLUMN
    for split in dataset:
        columns = dataset[split].column_names
        answer = script.answer_column if split == script.dataset_test_split else None
        asked = {name: getattr(script, name) for name in ("prompt_column", "solution_column", "wrong_solution_column")}
        asked = {name: column for name, column in asked.items() if column in renamed} | {"answer_column": answer}
        for option, column in asked.items():
            if column is not None and columns is not None and column not in columns:
                raise ValueError(
                    f"{option}: expected one of the columns {columns} of the split {split!r}; got {column!r}. Name the right "
                    f"one with --{option}."
                )
        for old, new in renamed.items():
            if old != new:
                if new in (columns or ()):  # the column that was named takes its place
                    dataset[split] = dataset[split].remove_columns(new)
                dataset[split] = dataset[split].rename_column(old, new)
        if answer is not None and (column := renamed.get(answer, answer)) != ANSWER_COLUMN:
            # copied, since it may be the solutions' column too
            dataset[split] = dataset[split].map(_with_answer, fn_kwargs={"column": column})
        if script.text_as_conversation:
            dataset[split] = dataset[split].map(_as_conversation)
    return dataset


def load_splits(script: TrainArguments) -> Any:
    """The splits of dataset_name as they are. Raises ValueError where it cannot be loaded."""
    assert script.dataset_name is not None
    source, options = script.dataset_name, {"name": script.dataset_config, "streaming": script.dataset_streaming}
    builder = DATA_FILES.get(Path(source).suffix)
    if builder is not None and Path(source).is_file():
        if script.dataset_config is not None:
            raise ValueError(
                f"dataset_config: expected none with a file, which has none; got {script.dataset_config!r}."
            )
        source, options["data_files"] = builder, {script.dataset_train_split: source}
    try:
        return load_dataset(source, **options)
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        empty = isinstance(cause, StopIteration) or "no data" in str(cause)  # as it is split or streamed
        reason = "no row" if empty else f"{type(cause).__name__}: {cause}"
        raise ValueError(no_data(script.dataset_name, reason)) from error


def _with_test_split(dataset: Any, size: float, script: TrainArguments, seed: int) -> Any:
    """Rows of the split for training held out as the one for evaluation. Raises ValueError where that cannot be."""
    train, test = script.dataset_train_split, script.dataset_test_split
    rows = split_of(dataset, train, "dataset_train_split")
    if not 0 < size < 1:
        raise ValueError(f"test_split_size: expected a share between 0 and 1; got {size}.")
    if isinstance(rows, IterableDataset) or test in dataset:
        got = "a stream" if isinstance(rows, IterableDataset) else f"a split {test!r}, which evaluation takes"
        raise ValueError(f"test_split_size: expected rows that can be held out; got {got}. Leave it out.")
    if round(len(rows) * size) in (0, len(rows)):
        raise ValueError(f"test_split_size: expected rows on both sides; got {size} of {len(rows)} rows.")
    parts = rows.train_test_split(test_size=round(len(rows) * size), seed=seed)
    dataset[train], dataset[test] = parts["train"], parts["test"]
    return dataset


def split_of(dataset: Any, name: str, option: str) -> Any:
    """One split. Raises ValueError where there is none of that name, which ``option`` gave."""
    if name not in dataset:
        raise ValueError(
            f"{option}: expected one of the splits {list(dataset)}; got {name!r}."
            + (" test_split_size holds rows out." if option == "dataset_test_split" else "")
        )
    return dataset[name]


def checkpoint_to_resume(args: PurifiedOPSDConfig) -> str | None:
    """The checkpoint that the command goes on from: the one that ``--resume_from_checkpoint`` names, otherwise the last whole
    one in output_dir, or None where there is none yet. So the same command resumes.

    Raises ValueError where ``false`` would start over and write over checkpoints.
    """
    wanted = str(args.resume_from_checkpoint).lower()
    if wanted not in ("true", "1", "yes", "none", "false", "0", "no"):
        return args.resume_from_checkpoint
    newest = newest_whole_checkpoint(args.output_dir)
    if newest is not None and wanted in ("false", "0", "no"):
        raise ValueError(
            f"resume_from_checkpoint: expected a folder without checkpoints to start over in; got {newest}. Pass another "
            "output_dir, remove them, or leave the option out to go on from the last."
        )
    return newest


def _as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    text = row["prompt"]
    return {"prompt": [{"role": "user", "content": text}] if isinstance(text, str) else text}


def _with_answer(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {ANSWER_COLUMN: row[column]}
