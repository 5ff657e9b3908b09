"""``popsd train``: PurifiedOPSDTrainer from a YAML file and flags, with TRL's own argument groups.

Flags override the file, and a misspelt name is refused in both. ``--dry_run`` stops before the weights are loaded.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AutoConfig, AutoTokenizer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from popsd.engine.workspace import CPU_WORKSPACE_MIB, GPU_WORKSPACE_MIB
from popsd_integrations.huggingface.heads import without_weights
from popsd_integrations.huggingface.objective import needed_contexts
from popsd_integrations.huggingface.prompts import ContextBuilder, thinking_states
from popsd_integrations.runs.report import how_to_go_on, write_page
from popsd_integrations.trl_trainer.callbacks import newest_whole_checkpoint
from popsd_integrations.trl_trainer.dataset import (
    ANSWER_COLUMN,
    SOLUTION_COLUMNS,
    WRONG_COLUMN,
    RowCheck,
    check_rows,
    problem_of,
    with_other_solutions,
)
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer


@dataclass
class TrainArguments(ScriptArguments):
    """Where the data is, and what to do with it."""

    prompt_column: str = field(default="prompt", metadata={"help": "Column with the questions."})
    solution_column: str | None = field(
        default=None, metadata={"help": f"Column with the reference solutions. None: one of {SOLUTION_COLUMNS}."}
    )
    wrong_solution_column: str = field(
        default=WRONG_COLUMN, metadata={"help": "Column with wrong solutions, for loss_target contrastive_hints."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": f"Column with the answers, for eval_scorer. None: {ANSWER_COLUMN}."}
    )
    text_as_conversation: bool = field(
        default=False,
        metadata={"help": "Write a question given as text as a user's message, so that it takes the chat template."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the first example's prompts as tokenised, the memory plan and what max_prompt_length drops, "
            "and stop."
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, load and train; returns 0. Raises ValueError on bad input."""
    script, args, model_args, mixture = read_options(list(sys.argv[1:] if arguments is None else arguments))
    if script.answer_column is not None and args.eval_scorer is None:
        raise ValueError(f"answer_column: expected none without eval_scorer; got {script.answer_column!r}.")
    resumed = checkpoint_to_resume(args)
    dataset = load_data(script, mixture)
    train_dataset = split_of(dataset, script.dataset_train_split, "dataset_train_split")
    evaluated = args.eval_strategy != "no"
    eval_dataset = split_of(dataset, script.dataset_test_split, "dataset_test_split") if evaluated else None
    peft_config = get_peft_config(model_args)
    if script.dry_run:
        first = next(iter(with_other_solutions(train_dataset, script.dataset_train_split, args)), None)
        if first is None:
            raise ValueError(f"dataset_name: expected at least one row; got none in {script.dataset_train_split!r}.")
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
        student = student_without_weights(model_args.model_name_or_path, args)
        print(describe_prompts(first, tokenizer, args))
        print(memory_plan(student, args, peft_config))
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if rows is not None:
                print(f"=== {describe_rows(rows, name, tokenizer, student, args)}")
        return 0
    trainer = PurifiedOPSDTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resumed)
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
    parser = TrlParser((TrainArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig), prog="popsd train")
    if (not trains or _is_dry(given)) and not torch.accelerator.is_available():
        given = [
            *given,
            "--use_cpu",
            "true",
        ]  # transformers refuses bf16 without a GPU, and nothing will be trained here
    script, args, model_args, mixture = parser.parse_args_and_config(list(given))
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path: expected a model; got none. Pass --model_name_or_path or set it in --config."
        )
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


def load_data(script: TrainArguments, mixture: Any) -> Any:
    """Splits with the columns that the trainer takes."""
    if bool(mixture.datasets) == bool(script.dataset_name):
        raise ValueError(
            "dataset_name: expected it or a mixture in `datasets`, and not both; a folder with train.jsonl will do."
        )
    for name, other in (
        ("dataset_config", "datasets"),
        ("dataset_streaming", "datasets"),
        ("test_split_size", "dataset_name"),
    ):
        value = getattr(mixture if other == "dataset_name" else script, name)
        if value and getattr(mixture if other == "datasets" else script, other):
            raise ValueError(f"{name}: expected none with {other}, where it would be ignored; got {value!r}.")
    if script.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers: expected False, since nothing here reads it; got True.")
    dataset = get_dataset(mixture) if mixture.datasets else _load(script)
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


def _load(script: TrainArguments) -> Any:
    assert script.dataset_name is not None
    source, options = script.dataset_name, {"name": script.dataset_config, "streaming": script.dataset_streaming}
    builder = _BUILDER_OF.get(Path(source).suffix)
    if builder is not None and Path(source).is_file():
        source, options["data_files"] = builder, {script.dataset_train_split: source}
    try:
        return load_dataset(source, **options)
    except (DatasetsError, OSError, StopIteration) as error:  # the last for an empty file
        cause = error.__cause__ or error
        raise ValueError(
            f"dataset_name: expected a hub name, a folder or a file of rows ({', '.join(_BUILDER_OF)}); got "
            f"{script.dataset_name!r} ({type(cause).__name__}: {cause})."
        ) from error


_BUILDER_OF = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def split_of(dataset: Any, name: str, option: str) -> Any:
    """One split. Raises ValueError where there is none of that name, which ``option`` gave."""
    if name not in dataset:
        raise ValueError(f"{option}: expected one of the splits {list(dataset)}; got {name!r}.")
    return dataset[name]


def _is_dry(arguments: Sequence[str]) -> bool:
    """Whether flags, or the file that they name, ask for a dry run; known before the parser, which checks bf16 by itself."""

    def value(flag: str) -> str | None:
        for place, argument in enumerate(arguments):
            name, _, attached = argument.partition("=")
            if name == flag:
                following = "".join(arguments[place + 1 : place + 2])
                return attached or ("true" if following.startswith("--") else following or "true")
        return None

    path, flag = value("--config"), value("--dry_run")
    if flag is None and path is not None and Path(path).is_file():
        flag = str((yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("dry_run"))
    return str(flag).lower() in ("true", "1", "yes")


def describe_prompts(row: dict[str, Any], tokenizer: Any, args: PurifiedOPSDConfig) -> str:
    """The three prompts of an example: the decoded tokens, their number, first and last ids, and thinking state."""
    prompts = ContextBuilder(tokenizer, args.context_config(), text_as_chat=False).build(problem_of(row))
    if prompts is None:
        return f"The first example is dropped: a prompt of it has more than {args.max_prompt_length} tokens."
    states = thinking_states(tokenizer, prompts)
    contexts = args.context_config()
    given = {
        "solution": "teacher",
        "solution_only": "reference-only teacher",
        "wrong_hint": "teacher with the wrong hint",
        "other_problem": "teacher with another problem's solution",
        "none": "teacher without a reference",
    }
    readers = ("student and base", given[contexts.teacher_reference], given[contexts.reference])
    whose = dict(zip(prompts._fields, readers, strict=True))
    parts = []
    for name, ids in prompts._asdict().items():
        shown = " ".join(map(str, ids if len(ids) <= 24 else [*ids[:12], "…", *ids[-12:]]))
        parts.append(
            f"=== {name} ({whose[name]}): {len(ids)} tokens, thinking {states[name]}\n"
            f"{_printable(tokenizer.decode(ids))}\n    ids {shown}"
        )
    return "\n".join(parts)


def _printable(text: str) -> str:
    """Text from data for a terminal: control and direction characters as escapes, which would act on it."""
    return "".join(x if x in "\n\t" or unicodedata.category(x) not in ("Cc", "Cf") else ascii(x)[1:-1] for x in text)


def describe_rows(rows: Any, name: str, tokenizer: Any, student: Any, args: PurifiedOPSDConfig) -> str:
    """What max_prompt_length does to the data. Raises ValueError on a row that training would refuse."""
    check = RowCheck(ContextBuilder(tokenizer, args.context_config(), text_as_chat=False), student, args)
    if isinstance(rows, IterableDataset):
        return f"{name}: a stream, whose problems are looked at as they come"
    keep, counted = check.kept(rows, name)
    if name == "train_dataset":
        processes = max(1, args.world_size)
        check_rows(len(keep), args.per_device_train_batch_size * args.gradient_accumulation_steps * processes)
    return str(counted)


def student_without_weights(model: str, args: PurifiedOPSDConfig) -> Any:
    """The student, of sizes alone: no weight is loaded."""
    kwargs = dict(args.model_init_kwargs or {})
    config = AutoConfig.from_pretrained(
        model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
    )
    dtype = kwargs.get("dtype") or "float32"
    dtype = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    return without_weights(config, dtype=dtype)


def memory_plan(student: Any, args: PurifiedOPSDConfig, peft_config: Any) -> str:
    """What one process holds beside activations and the generation cache, before any sharding."""
    config, dtype = student.config, student.dtype
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            student = get_peft_model(student, peft_config)
    trained = [p for p in student.parameters() if p.requires_grad]
    weights, trained_bytes = (sum(p.numel() * p.itemsize for p in x) for x in (student.parameters(), trained))
    rows, text = args.per_device_train_batch_size, config.get_text_config()
    itemsize = 2 if args.bf16 or args.fp16 else dtype.itemsize
    contexts = needed_contexts(args.loss_target, decompose=args.diagnostics_steps > 0)
    streams = len(contexts) + 2  # the student's and its gradient
    workspace = args.workspace_mib or (GPU_WORKSPACE_MIB if torch.cuda.is_available() else CPU_WORKSPACE_MIB)
    plan = {
        "weights": weights,
        "gradients of what is trained": trained_bytes,
        "AdamW's moments": 2 * trained_bytes,
        "hidden states in the loss, at most": streams * rows * args.max_completion_length * text.hidden_size * itemsize,
        "logits in the loss, at most": int(workspace * 2**20),
    }
    if args.frozen_weights == "ema":
        plan["moving average"] = trained_bytes + sum(4 * p.numel() for p in trained if p.itemsize < 4)
    elif peft_config is None:
        plan["copy of the initial weights"] = weights
    trained_count = sum(p.numel() for p in trained)
    logits = 4 * rows * args.max_completion_length * text.vocab_size
    lines = [f"  {name:<36} {size / 2**30:9.3f} GiB" for name, size in plan.items()]
    return "\n".join(
        [
            f"=== memory of one process, without activations and generation cache; {trained_count:,} parameters trained",
            *lines,
            f"  {'sum':<36} {sum(plan.values()) / 2**30:9.3f} GiB",
            f"  never held: logits of a micro-batch, {logits / 2**30:.3f} GiB in float32 for each of the distributions",
        ]
    )


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
