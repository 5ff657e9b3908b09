"""What ``popsd train`` would train, from the same options: its model, prompts, target, masks and way of sampling.

The options are read by the trainer's own parser and the prompts written by its own configuration, so that a name or a default
cannot mean one thing here and another there. The one module of this package that knows the trainer.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoTokenizer
from trl import get_quantization_config
from trl.trainer.utils import create_model_from_path

from popsd_integrations.commandline.places import loading
from popsd_integrations.diagnose.measure import DiagnoseConfig
from popsd_integrations.diagnose.settings import Setting
from popsd_integrations.huggingface.prompts import ContextBuilder, Prompts, thinking_states
from popsd_integrations.huggingface.sampling import hf_generate
from popsd_integrations.trl_trainer.command import load_data, read_options, split_of
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig
from popsd_integrations.trl_trainer.dataset import check_columns, problem_of, with_other_solutions

_SHUFFLED = 10_000
"""Rows of a stream that are held to draw from."""


def read(given: Sequence[str], completions: int, folder: Path | None) -> Setting:
    """The setting of a command line of ``popsd train``, weights loaded. folder: None is ``diagnose`` in the run's output_dir.

    Raises ValueError on what ``popsd train`` refuses, before the weights are loaded.
    """
    script, args, model_args, mixture = read_options(given, trains=False)
    name, init = str(model_args.model_name_or_path), dict(args.model_init_kwargs or {})
    dataset = split_of(load_data(script, mixture, args.seed), script.dataset_train_split, "dataset_train_split")
    check_columns(dataset, "train_dataset", args)
    dataset = with_other_solutions(dataset, "train_dataset", args)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=init.get("revision") or "main", trust_remote_code=args.trust_remote_code
        )
        prompts, rows = _prompts(
            dataset, ContextBuilder(tokenizer, args.context_config(), text_as_chat=False), args, completions
        )
        model = create_model_from_path(
            name,
            trust_remote_code=args.trust_remote_code,
            **init,
            **_some(quantization_config=get_quantization_config(model_args)),
        )
    if not hasattr(model, "hf_device_map"):
        model.to(args.device)
    config = _config(args, tokenizer, completions)
    data = script.dataset_name or "a mixture of " + ", ".join(str(x.path) for x in mixture.datasets)
    about = {
        "Model": f"{name}, {model.dtype} weights" + (f", {config.autocast} autocast" if config.autocast else ""),
        "Data": f"{data}, {script.dataset_train_split}: {rows}",
        "Target": f"loss_target {args.loss_target}, {config.loss}" + (f", {config.masks}" if config.masks else ""),
        "Prompts end": ", ".join(f"{x}: thinking {y}" for x, y in thinking_states(tokenizer, prompts[0]).items()),
        "Sampling": f"temperature {config.temperature}, {_filters(args)}, at most {args.max_completion_length} tokens, seed "
        f"{args.seed}, by transformers" + (" (training will use vLLM)" if args.use_vllm else ""),
    }
    return Setting(
        model.eval(),
        tokenizer,
        prompts,
        config,
        Path(args.output_dir) / "diagnose" if folder is None else folder,
        about,
        functools.partial(hf_generate, **_filters(args)),
        args.token_weights,
    )


def _config(args: PurifiedOPSDConfig, tokenizer: Any, completions: int) -> DiagnoseConfig:
    loss = args.loss_function(tokenizer)
    assert args.max_completion_length is not None
    return DiagnoseConfig(
        completions=completions,
        batch_size=args.per_device_train_batch_size,
        max_new_tokens=args.max_completion_length,
        temperature=float({"temperature": args.temperature, **(args.generation_kwargs or {})}["temperature"]),
        loss_target=args.loss_target,
        loss=loss.config,
        masks=loss.masks,
        markers=args.epistemic_markers(),
        seed=args.seed,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
    )


def _filters(args: PurifiedOPSDConfig) -> dict[str, Any]:
    """Of the samples, as TRL sets them."""
    own = {"top_p": args.top_p, "top_k": args.top_k, "repetition_penalty": args.repetition_penalty}
    own |= _some(min_p=args.min_p) | (args.generation_kwargs or {})
    return {name: value for name, value in own.items() if name != "temperature"}


def _some(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _prompts(dataset: Any, builder: ContextBuilder, args: PurifiedOPSDConfig, count: int) -> tuple[list[Prompts], str]:
    """Prompts of ``count`` random rows and which rows these are, in words. Rows that training drops are passed over."""
    prompts: list[Prompts] = []
    places = []
    for place, row in _drawn(dataset, args.seed):
        try:
            built = builder.build(problem_of(row))
        except ValueError as error:
            raise ValueError(f"train_dataset, row {place}: {error}") from error
        if built is not None:
            prompts.append(built)
            places.append(place)
        if len(prompts) == count:
            break
    if not prompts:
        raise ValueError(f"train_dataset: expected at least one usable row; {builder.dropped} were dropped.")
    shown = ", ".join(map(str, places[:10])) + ", …" * (len(places) > 10)
    more = f"; {builder.dropped} more were dropped as too long" if builder.dropped else ""
    more += f"; {builder.truncated} have their solution cut" if builder.truncated else ""
    return prompts, f"{len(prompts)} rows drawn with seed {args.seed} ({shown}){more}"


def _drawn(dataset: Any, seed: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows in random order, with their places; of a stream, places in the order drawn."""
    if isinstance(dataset, IterableDataset):
        yield from enumerate(dataset.shuffle(seed=seed, buffer_size=_SHUFFLED))
        return
    places = list(range(len(dataset)))
    random.Random(seed).shuffle(places)
    for place in places:
        yield place, dataset[place]
