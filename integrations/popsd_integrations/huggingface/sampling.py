"""Completions of a student: by ``model.generate``, or by any function of the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from popsd_integrations.huggingface.heads import causal_model, eval_mode
from popsd_integrations.huggingface.packing import padded
from popsd_integrations.huggingface.prompts import Prompts

Generate = Callable[..., list[list[int]]]


class Sampler:
    """Completions of a model on the questions of prompts, in eval mode.

    tokenizer: with an eos_token_id, where the model's generation_config names none. temperature: 0 is greedy.
    generate: called as ``generate(model, questions, max_new_tokens=, temperature=, eos_token_id=, pad_token_id=)`` with
        questions as lists of token ids; returns completions as such lists. None: `hf_generate`.
    Raises ValueError where no end-of-sequence token is known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        generate: Generate | None = None,
    ) -> None:
        self.eos_token_id, self.pad_token_id = special_tokens(model, tokenizer)
        self._generate: Generate = generate or hf_generate
        self._options = {"max_new_tokens": max_new_tokens, "temperature": temperature}

    def __call__(self, model: nn.Module, prompts: Sequence[Prompts]) -> list[list[int]]:
        with eval_mode(model):
            return self._generate(
                model,
                [row.question for row in prompts],
                eos_token_id=self.eos_token_id,
                pad_token_id=self.pad_token_id,
                **self._options,
            )


def hf_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: Sequence[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Completions by ``model.generate``: samples of softmax(logits / temperature), or the argmax at temperature 0.

    prompts: B lists of token ids. Returns B lists, each up to its first end-of-sequence token, which is included.
    No filter and no penalty applies, whatever the model's own generation_config says (see `only_given_settings`).

    >>> options = {"max_new_tokens": 3, "temperature": 0.0, "eos_token_id": [49], "pad_token_id": 0}
    >>> [len(completion) for completion in hf_generate(model, [[1, 2]], **options)]
    [3]
    """
    from transformers import GenerationConfig

    input_ids, attention_mask = padded(prompts, pad_token_id, device=causal_model(model).device)
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # generate fills what nobody set from its own defaults, and one of them is top_k=50
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with only_given_settings(model):
        generated = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, eos_token_id=list(eos_token_id), pad_token_id=pad_token_id, **settings
            ),
        )
    ends = set(eos_token_id)
    completions = []
    for row in generated[:, input_ids.shape[1] :].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        completions.append(row[:length])
    return completions


@contextmanager
def only_given_settings(model: Any) -> Iterator[None]:
    """Inside, ``model.generate`` uses the settings it is given and none of the model's own generation_config.

    ``generate`` fills every setting that is left unset from ``model.generation_config``. There are dozens, and many change
    what is sampled: top_k, suppress_tokens, no_repeat_ngram_size, min_new_tokens, guidance_scale, num_return_sequences.
    The samples would be another policy's than the student's. The model's own configuration is back on leaving, so that
    it is saved with the model.
    """
    from transformers import GenerationConfig

    causal = causal_model(model)
    own = causal.generation_config
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own


def special_tokens(model: nn.Module, tokenizer: Any) -> tuple[list[int], int]:
    """End-of-sequence ids (a chat model often has several, in its generation_config) and the padding id.

    Raises ValueError where neither the model nor the tokenizer names an end-of-sequence token.
    """
    eos = getattr(getattr(causal_model(model), "generation_config", None), "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError("tokenizer: expected an eos_token_id; got None. Set tokenizer.eos_token.")
    ends = [eos] if isinstance(eos, int) else list(eos)
    return ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
