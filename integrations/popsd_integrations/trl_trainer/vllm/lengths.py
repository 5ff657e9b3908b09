"""How long a question and its completion become, which is what vLLM keeps memory for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from datasets import IterableDataset

from popsd_integrations.huggingface.prompts import ContextBuilder, Problem


def set_max_length(args: Any, data: Mapping[str, Any], tokenizer: Any) -> int | None:
    """Set ``vllm_max_model_length`` in colocate mode, where it is None, to the longest question and completion together.

    args: a `PurifiedOPSDConfig` with ``use_vllm``. data: the datasets, by name. Only the question is generated from: the
    prompts of teacher and reference do not count. Returns that length; None for a stream without max_prompt_length, where
    vLLM takes the model's own.
    Raises ValueError for a ``vllm_max_model_length`` that is less: vLLM would cut completions short.
    """
    completion = max(args.max_completion_length, args.eval_max_new_tokens or 0)
    question = _longest_question(
        list(data.values()), ContextBuilder(tokenizer, args.context_config(), text_as_chat=False)
    )
    needed = None if question is None else question + completion
    given = args.vllm_max_model_length
    if needed is not None and given is not None and given < needed:
        raise ValueError(
            f"vllm_max_model_length: expected at least {needed}, the longest question ({question} tokens) and the longest "
            f"completion ({completion}); got {given}, at which vLLM would cut completions short. Leave it out."
        )
    if args.vllm_mode == "colocate" and given is None:
        args.vllm_max_model_length = needed
    return needed


def _longest_question(datasets: list[Any], contexts: ContextBuilder) -> int | None:
    limit, longest = contexts.config.max_prompt_length, 0
    for dataset in datasets:
        parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
        if any(isinstance(part, IterableDataset) for part in parts):
            return limit
        for part in parts:
            for row in part.select_columns("prompt"):
                with suppress(Exception):  # a row that gives no prompt is named by the trainer's own check
                    length = len(contexts.question(Problem(row["prompt"], "")))
                    if limit is None or length <= limit:  # or it is dropped
                        longest = max(longest, length)
    return longest
