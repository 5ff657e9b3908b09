"""Completions of a student by ``model.generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from popsd_integrations.huggingface.heads import causal_model


def hf_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: Sequence[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Completions by ``model.generate``, the end-of-sequence token included where it came. temperature 0 is greedy.

    Every filter is set explicitly: ``generate`` fills what is left unset from the model's own generation_config, and
    Qwen3's top_k = 20, top_p = 0.95 would make the samples another policy's than the student's.
    """
    from transformers import GenerationConfig

    device = causal_model(model).device
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    settings: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": 1, "repetition_penalty": 1.0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=list(eos_token_id), pad_token_id=pad_token_id, **settings
        ),
    )
    ends = set(eos_token_id)
    completions = []
    for row in generated[:, width:].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        completions.append(row[:length])
    return completions


def special_tokens(model: nn.Module, tokenizer: Any) -> tuple[list[int], int]:
    """End-of-sequence ids (a chat model often has several, in its generation_config) and the padding id."""
    eos = getattr(getattr(causal_model(model), "generation_config", None), "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError("tokenizer: expected an eos_token_id; got None. Set tokenizer.eos_token.")
    ends = [eos] if isinstance(eos, int) else list(eos)
    return ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
