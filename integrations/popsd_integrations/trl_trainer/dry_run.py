"""``popsd train --dry_run``: everything that training checks and that needs no weights, over the whole data.

It needs no GPU. What training would refuse is refused here, in the same words.
"""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset
from transformers import AutoConfig

from popsd.engine.workspace import CPU_WORKSPACE_MIB, GPU_WORKSPACE_MIB
from popsd_integrations.commandline.devices import Device, device_named
from popsd_integrations.huggingface.heads import without_weights
from popsd_integrations.huggingface.objective import needed_contexts
from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, thinking_states
from popsd_integrations.huggingface.sampling import check_ends
from popsd_integrations.runs.held_out import Judge
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig
from popsd_integrations.trl_trainer.dataset import (
    Counted,
    RowCheck,
    check_columns,
    check_evaluation,
    check_rows,
    problem_of,
    tokenizer_of,
    with_other_solutions,
)
from popsd_integrations.trl_trainer.frozen import prepare_student


def dry_run(
    model: str, args: PurifiedOPSDConfig, peft_config: Any, data: dict[str, Any], device: str | None
) -> list[str]:
    """What to print. data: train_dataset, and eval_dataset or None. device: as the option.

    Raises ValueError and TypeError for what training would refuse before its first step, and where the device is too small.
    """
    planned = device_named(device)
    looked = look(model, args, data)
    first = next(iter(looked.data["train_dataset"]), None)
    if first is None:
        raise ValueError("train_dataset: expected at least one row; got none. Pass other data.")
    student, tokenizer = looked.student, looked.tokenizer
    memory = memory_plan(student, args, peft_config, planned)
    rows = [f"=== {describe_rows(rows, name, looked.check, args)}" for name, rows in looked.data.items()]
    tokens = f"=== {describe_tokens(student, tokenizer, args)}"
    return [describe_prompts(first, tokenizer, args), tokens, memory, *rows]  # by now no row is refused


class Looked(NamedTuple):
    """What was looked at: the student without its weights, its tokenizer, the check of every row, and the data by name."""

    student: Any
    tokenizer: Any
    check: RowCheck
    data: dict[str, Any]


def look(model: str, args: PurifiedOPSDConfig, data: dict[str, Any]) -> Looked:
    """Everything that training checks before it reads the rows. data: train_dataset, and eval_dataset or None."""
    check_evaluation(data["eval_dataset"], args)
    given = {name: rows for name, rows in data.items() if rows is not None}
    for name, rows in given.items():
        check_columns(rows, name, args)
    given = {name: with_other_solutions(rows, name, args) for name, rows in given.items()}
    student = student_without_weights(model, args)
    prepare_student(student)
    tokenizer = tokenizer_of(None, model, args)
    check_ends([tokenizer.eos_token_id], args.vocab_size)
    args.loss_function(tokenizer)  # the tokens of protect_markers
    judge = None if args.eval_scorer is None else Judge(args.eval_scorer, tokenizer, [tokenizer.eos_token_id])
    contexts = ContextBuilder(tokenizer, args.context_config(), text_as_chat=False)
    return Looked(student, tokenizer, RowCheck(contexts, student, args, judge), given)


def describe_tokens(student: Any, tokenizer: Any, args: PurifiedOPSDConfig) -> str:
    """The head's rows beside the tokenizer's tokens, the chat template, and which markers are tokens."""
    rows = student.config.get_text_config().vocab_size
    lines = [f"head of {rows} rows, tokenizer of {len(tokenizer)} tokens"]
    if args.vocab_size is None and rows > len(tokenizer):
        lines.append(
            f"  the last {rows - len(tokenizer)} rows are padding: vocab_size {len(tokenizer)} leaves them out"
        )
    lines.append(f"  chat template: {'yes' if tokenizer.chat_template else 'none'}")
    found = {word: args.epistemic_markers().count_ids([ids], tokenizer).total for word, ids in _spelt(tokenizer, args)}
    unseen = [word for word, count in found.items() if not count]
    lines.append(f"  markers: {', '.join(found)}" + (f"; not found in their own text: {unseen}" if unseen else ""))
    return "\n".join(lines)


def _spelt(tokenizer: Any, args: PurifiedOPSDConfig) -> list[tuple[str, list[int]]]:
    return [(word, tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in args.markers]


def describe_prompts(row: dict[str, Any], tokenizer: Any, args: PurifiedOPSDConfig) -> str:
    """The three prompts of an example: the decoded tokens, their number, first and last ids, and thinking state."""
    prompts = ContextBuilder(tokenizer, args.context_config(), text_as_chat=False).build(problem_of(row))
    if prompts is None:
        return f"The first example is dropped: a prompt of it has more than {args.max_prompt_length} tokens."
    states = thinking_states(tokenizer, prompts)
    contexts = args.context_config()
    names = dict(zip(prompts._fields, _names(contexts), strict=True))
    parts = []
    for name, ids in prompts._asdict().items():
        shown = " ".join(map(str, ids if len(ids) <= 24 else [*ids[:12], "…", *ids[-12:]]))
        parts.append(
            f"=== {names[name]}: {len(ids)} tokens, thinking {states[name]}\n"
            f"{_printable(tokenizer.decode(ids))}\n    ids {shown}"
        )
    return "\n".join(parts)


def _printable(text: str) -> str:
    """Text from data for a terminal: control and direction characters as escapes, which would act on it."""
    return "".join(x if x in "\n\t" or unicodedata.category(x) not in ("Cc", "Cf") else ascii(x)[1:-1] for x in text)


def _names(contexts: ContextConfig) -> tuple[str, str, str]:
    """What each of the three prompts is, in the order of the fields of `Prompts`."""
    given = {
        "solution": "the question and its solution",
        "solution_only": "the solution without the question",
        "wrong_hint": "the question and the wrong hint",
        "other_problem": "the question and another problem's solution",
        "none": "the question alone",
    }
    return (
        "prompt of the student and the base: the question alone",
        f"prompt of the teacher: {given[contexts.teacher_reference]}",
        f"prompt of the reference-only teacher: {given[contexts.reference]}",
    )


def describe_rows(rows: Any, name: str, check: RowCheck, args: PurifiedOPSDConfig) -> str:
    """What max_prompt_length does to the data, lengths, and steps. Raises ValueError on a row that training would refuse."""
    if isinstance(rows, IterableDataset):
        check.dataset(rows, name)  # its first row
        return f"{name}: a stream, whose problems are looked at as they come"
    _, counted = check.kept(rows, name)
    return describe_counted(counted, args)


def describe_counted(counted: Counted, args: PurifiedOPSDConfig) -> str:
    """The same of rows that were counted."""
    lines, used = [str(counted)], len(counted.lengths)
    for whose, lengths in zip(_names(args.context_config()), zip(*counted.lengths, strict=True), strict=True):
        points = ", ".join(f"{at} % {np.percentile(lengths, at, method='higher'):.0f}" for at in (0, 50, 90, 99, 100))
        lines.append(f"  tokens in the {whose}: {points}")
    if counted.name == "train_dataset":
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        step //= args.num_generations
        check_rows(used, step)
        lines.append(f"  {used // step} steps per epoch, of {step} problems each; {used} problems are used")
    return "\n".join(lines)


def student_without_weights(model: str, args: PurifiedOPSDConfig) -> Any:
    """The student, of sizes alone: no weight is loaded."""
    kwargs = dict(args.model_init_kwargs or {})
    config = AutoConfig.from_pretrained(
        model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
    )
    dtype = kwargs.get("dtype") or "float32"
    dtype = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    return without_weights(config, dtype=dtype)


def memory_plan(student: Any, args: PurifiedOPSDConfig, peft_config: Any, device: Device | None) -> str:
    """What one process holds beside activations and the generation cache, before any sharding.

    Raises ValueError where that is more than the device has, and nothing is sharded.
    """
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
    workspace = args.workspace_mib or (GPU_WORKSPACE_MIB if device is not None else CPU_WORKSPACE_MIB)
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
    total = sum(plan.values()) / 2**30
    lines.append(f"  {'sum':<36} {total:9.3f} GiB")
    if device is not None:
        shards = bool(args.fsdp) or args.deepspeed is not None
        lines.append(f"  {device.name + (', before sharding' if shards else ''):<36} {device.gib:9.3f} GiB")
        if total > device.gib and not shards:
            raise ValueError(
                f"device: expected one with more than the {total:.1f} GiB that this run holds without activations; got "
                f"{device.name} with {device.gib:.1f} GiB. Train LoRA (use_peft), in bfloat16 (dtype), or a smaller model."
            )
    return "\n".join(
        [
            f"=== memory of one process, without activations and generation cache; {trained_count:,} parameters trained",
            *lines,
            f"  never held: logits of a micro-batch, {logits / 2**30:.3f} GiB in float32 for each of the distributions",
        ]
    )
