"""Several completions of each prompt: rows of a prompt stand together, and there are equally many of each."""

from __future__ import annotations

import array
import inspect
import statistics
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.heads import causal_model

T = TypeVar("T")


def repeated(items: Sequence[T], number: int) -> list[T]:
    """Each item so many times, one beside the other.

    >>> repeated(["a", "b"], 2)
    ['a', 'a', 'b', 'b']
    """
    return [item for item in items for _ in range(number)]


def check_generations(num_generations: int, rows: int, whose: str) -> None:
    """Raise ValueError where ``rows``, the completions of a step, are not whole prompts. whose: the option, or a product."""
    if num_generations < 1:
        raise ValueError(f"num_generations: expected at least 1; got {num_generations}.")
    if rows % num_generations:
        raise ValueError(
            f"num_generations: expected a divisor of the {rows} completions of a step ({whose}); got {num_generations}. "
            "They are of so many prompts that each has all of its own."
        )


def within_prompts(rows: Sequence[Sequence[int]], number: int) -> dict[str, float]:
    """How completions of one prompt differ, as means over prompts.

    rows: `facts` of all completions, those of a prompt together; number: of each prompt, at least 2.
    Returns ``prompts/length_std`` and ``prompts/markers_std``, sample standard deviations, and ``prompts/distinct``, the share
    of completions that are unlike the others of their prompt, each repetition counted once; it falls where sampling collapses.

    >>> within_prompts([(2, 0, 7), (4, 0, 8), (3, 1, 9), (3, 1, 9)], 2)["prompts/distinct"]
    0.75
    """
    groups = [rows[first : first + number] for first in range(0, len(rows), number)]
    return {
        "prompts/length_std": statistics.mean(statistics.stdev(row[0] for row in group) for group in groups),
        "prompts/markers_std": statistics.mean(statistics.stdev(row[1] for row in group) for group in groups),
        "prompts/distinct": statistics.mean(len({row[2] for row in group}) / number for group in groups),
    }


def facts(
    completions: Sequence[Sequence[int]], markers: EpistemicMarkers, tokenizer: Any
) -> list[tuple[int, int, int]]:
    """Length, markers and a fingerprint of each completion: whole numbers, which processes can send each other."""
    return [
        (len(ids), markers.count_ids([ids], tokenizer).total, zlib.crc32(array.array("q", ids).tobytes()))
        for ids in completions
    ]


@contextmanager
def prompts_run_once(model: Any) -> Iterator[None]:
    """Inside, ``model.generate`` runs a prompt that fills several rows, one beside the other, once.

    It computes the keys and values of the different prompts, without their last token, repeats them for the rows, and goes on
    from there. transformers (5.23) itself repeats the prompt before it runs it, for ``num_return_sequences`` too.
    """
    causal = causal_model(model)
    real = causal.generate

    def generate(
        *, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any, **further: Any
    ) -> Any:
        rows = input_ids.tolist()
        first = [place for place, row in enumerate(rows) if place == 0 or row != rows[place - 1]]
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if len(first) < len(rows) and input_ids.shape[1] > 1 and generation_config.cache_implementation is None:
            index = torch.tensor(first, device=input_ids.device)
            ids, mask = (x.index_select(0, index)[:, :-1] for x in given.values())
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            known = inspect.signature(causal.forward).parameters
            options = {"position_ids": positions, "logits_to_keep": 1}
            options = {name: value for name, value in options.items() if name in known}
            with torch.no_grad():
                cache = causal(input_ids=ids, attention_mask=mask, use_cache=True, **options).past_key_values
            ends = [*first[1:], len(rows)]
            of_row = [place for place, (a, b) in enumerate(zip(first, ends, strict=True)) for _ in range(b - a)]
            cache.batch_select_indices(torch.tensor(of_row, device=input_ids.device))
            given["past_key_values"] = cache
        return real(**given, generation_config=generation_config, **further)

    causal.generate = generate
    try:
        yield
    finally:
        del causal.generate
