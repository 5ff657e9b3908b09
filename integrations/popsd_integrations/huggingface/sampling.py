"""Completions of a student: by ``model.generate``, or by any function of the same arguments."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from popsd_integrations.huggingface.groups import prompts_run_once
from popsd_integrations.huggingface.heads import causal_model, eval_mode, own_logits, tolerance
from popsd_integrations.huggingface.packing import padded
from popsd_integrations.huggingface.prompts import Prompts

logger = logging.getLogger(__name__)

Generate = Callable[..., list[list[int]]]

_PROBE, _STEPS = 16, 5
"""Tokens of a prompt, and of its completion, by which it is seen whether prompts can be completed together."""
_REFUSED = 10
"""Times the tolerance of logits: more is another distribution and no rounding."""


class Sampler:
    """Completions of a model on the questions of prompts, in eval mode.

    tokenizer: with an eos_token_id, where the model's generation_config names none. temperature: 0 is greedy.
    generate: called as ``generate(model, questions, max_new_tokens=, temperature=, eos_token_id=, pad_token_id=)`` with
        questions as lists of token ids; returns completions as such lists. None: `hf_generate`.
    vocab_size: the leading rows of the head that the loss uses, `popsd.PurifiedConfig.vocab_size`. Where it is given,
        ``generate`` is told it, as ``vocab_size=``, and must sample no other token. None: the whole head.
    Raises ValueError where no end-of-sequence token is known, or none is below ``vocab_size``, and for a ``vocab_size`` larger
    than the head. Called, it raises ValueError for another number of completions than prompts,
    before the forward where a prompt and its completion would need more positions than the model has, and for a sampled
    token that the loss has not.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        generate: Generate | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.eos_token_id, self.pad_token_id = special_tokens(model, tokenizer)
        check_head(model, vocab_size)
        check_ends(self.eos_token_id, vocab_size)
        self.vocab_size = vocab_size
        self._generate: Generate = generate or hf_generate
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        if vocab_size is not None:
            self._options["vocab_size"] = vocab_size

    def __call__(self, model: nn.Module, prompts: Sequence[Prompts]) -> list[list[int]]:
        check_positions(model, prompts, self._options["max_new_tokens"])
        with eval_mode(model):
            completions = self._generate(
                model,
                [row.question for row in prompts],
                eos_token_id=self.eos_token_id,
                pad_token_id=self.pad_token_id,
                **self._options,
            )
        if len(completions) != len(prompts):
            raise ValueError(
                f"generate: expected {len(prompts)} completions; got {len(completions)}. Return one completion per prompt, in "
                "their order."
            )
        check_sampled(completions, self.vocab_size)
        return completions


def hf_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: Sequence[int],
    pad_token_id: int,
    vocab_size: int | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    **further: Any,
) -> list[list[int]]:
    """Completions by ``model.generate``: samples of softmax(logits / temperature), or the argmax at temperature 0.

    prompts: B lists of token ids. top_p, top_k: filters of the samples; 1 and 0 are none. further: other settings of
    ``transformers.GenerationConfig``, such as min_p. Returns B lists, each up to its first end-of-sequence token, which is
    included. The prompts are padded on the left to one batch. Where the model sees the padding, they are sampled one length
    at a time, and one by one where it sees the other rows. Raises ValueError where ``generate`` samples another distribution.
    No other filter and no penalty applies, whatever the model's own generation_config says (see `only_given_settings`), but
    that no token at or beyond ``vocab_size`` is sampled.

    >>> options = {"max_new_tokens": 3, "temperature": 0.0, "eos_token_id": [49], "pad_token_id": 0}
    >>> [len(completion) for completion in hf_generate(model, [[1, 2]], **options)]
    [3]
    """
    from transformers import GenerationConfig

    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # generate fills what nobody set from its own defaults, and one of them is top_k=50
        settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings |= further
    unused = unused_tokens(model, vocab_size)
    settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *unused}) or None
    settings |= {"eos_token_id": list(eos_token_id), "pad_token_id": pad_token_id}
    config = GenerationConfig(max_new_tokens=max_new_tokens, **settings)

    def generated(rows: Sequence[Sequence[int]]) -> list[list[int]]:
        input_ids, attention_mask = padded(rows, pad_token_id, device=causal_model(model).device)
        found = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        return [_to_first_end(row, set(eos_token_id)) for row in found[:, input_ids.shape[1] :].tolist()]

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_given_settings(model))
        if any(one == other for one, other in itertools.pairwise(prompts)) and exact_sharing(
            model, prompts, pad_token_id
        ):
            stack.enter_context(prompts_run_once(model))
        return grouped(prompts, exact_grouping(model, prompts, pad_token_id), generated)


def _to_first_end(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]


TOGETHER, BY_LENGTH, ALONE = "together", "by length", "alone"


def grouped(
    prompts: Sequence[Sequence[int]],
    grouping: str,
    generate: Callable[[list[Sequence[int]]], list[list[int]]],
) -> list[list[int]]:
    """Completions in the prompts' order, of ``generate`` called with the prompts that ``grouping`` puts together.

    >>> grouped([[1, 2], [3], [4, 5]], BY_LENGTH, lambda rows: [[len(row), len(rows)] for row in rows])
    [[2, 2], [1, 1], [2, 2]]
    """
    keys = {TOGETHER: lambda place: 0, BY_LENGTH: lambda place: len(prompts[place]), ALONE: lambda place: place}
    groups: dict[int, list[int]] = {}
    for place in range(len(prompts)):
        groups.setdefault(keys[grouping](place), []).append(place)
    completions: dict[int, list[int]] = {}
    for places in groups.values():
        made = generate([prompts[place] for place in places])
        if len(made) != len(places):
            raise ValueError(f"generate: expected {len(places)} completions, one per prompt; got {len(made)}.")
        completions |= zip(places, made, strict=True)
    return [completions[place] for place in range(len(prompts))]


def exact_grouping(model: Any, prompts: Sequence[Sequence[int]], pad_token_id: int) -> str:
    """Which prompts ``model.generate`` completes in one call by the model's own logits of each alone, for `grouped`.

    TOGETHER; or BY_LENGTH, where padding on the left is seen; or ALONE, where other rows are, as by RWKV of transformers 5.23,
    which mixes their cached states. It is measured on two short prompts, which takes little beside a batch of completions.
    Raises ValueError where not even one is, as by CamemBERT, whose positions ``generate`` counts from another number.
    """
    if not prompts:  # a stream that gives no row ends in an error of its own
        return TOGETHER
    one, other = _short(model, prompts)
    length = len(one)
    name = type(causal_model(model)).__name__
    errors: dict[str, float] = {}
    for grouping, rows in {TOGETHER: [one[: length // 2], other], BY_LENGTH: [one, other], ALONE: [one]}.items():
        errors[grouping] = _generation_error(model, rows, pad_token_id)
        if errors[grouping] <= 1:
            break
    # Where a mixture of experts rounds to 16 bits, none may be within it, and they differ by chance.
    best = min(errors.values())
    grouping = next(name for name, error in errors.items() if error <= max(1, 4 * best))
    if errors[grouping] > _REFUSED:
        raise ValueError(
            f"model: expected model.generate to sample by the model's own logits; those of {name} differ from its forward's by "
            f"{best:.3g} times what rounding explains. Pass a generate function of your own."
        )
    if grouping != TOGETHER:
        seen = "padding on the left" if grouping == BY_LENGTH else "the other rows"
        text = f"{name} sees {seen} when it generates, so prompts are sampled {grouping}, which is slower."
        warnings.warn(text, stacklevel=2)
    return grouping


def exact_sharing(model: Any, prompts: Sequence[Sequence[int]], pad_token_id: int) -> bool:
    """Whether ``model.generate`` samples by the model's own logits where each prompt is run once, as `prompts_run_once` has it.

    Measured as by `exact_grouping`, on two prompts of two completions each. A warning says where it does not.
    """
    one, other = _short(model, prompts)
    try:
        with prompts_run_once(model):
            error = _generation_error(model, [one[: len(one) // 2]] * 2 + [other] * 2, pad_token_id)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may have a cache of its own kind, or none
        error = math.inf
    if error > 1:
        name = type(causal_model(model)).__name__
        logger.warning(f"{name} cannot go on from a prompt's states, so it runs a prompt for each of its completions.")
    return error <= 1


def _short(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Two prompts of one length. In a batch of one prompt twice it would not show that rows are mixed, so one is turned."""
    length = max(2, min(_PROBE, (position_limit(model) or 2 * _PROBE) - _STEPS))
    first, *_, last = sorted([*prompts, prompts[0]], key=len)
    one, other = ((list(ids[-length:]) * length)[:length] for ids in (first, [*last[1:], last[0]]))
    return one, other


def _generation_error(model: Any, prompts: list[list[int]], pad_token_id: int) -> float:
    """Difference of the logits that ``model.generate`` draws from in one call to the model's own, as a share of the tolerance.

    Over a few steps, which are made to the same tokens.
    """
    from transformers import GenerationConfig

    forced = (prompts[0] * _STEPS)[:_STEPS]
    settings: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    config = GenerationConfig(max_new_tokens=_STEPS, pad_token_id=pad_token_id, **settings)
    # Padding with an ordinary token, because a padding token's embedding may be zero and hide that it is seen.
    ids, mask = padded(prompts, prompts[0][0], device=causal_model(model).device)
    with eval_mode(model), torch.no_grad(), only_given_settings(model):
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            prefix_allowed_tokens_fn=lambda _, row: [forced[len(row) - ids.shape[1]]],
        )
        own = torch.stack([own_logits(model, prompt, forced) for prompt in prompts])  # [rows, steps, V]
    limit, over_tokens = tolerance(model)
    errors = (torch.stack(made.logits, dim=1).float() - own).abs().amax(-1) / own.abs().amax((1, 2))[:, None]
    return float(errors.quantile(over_tokens, dim=1).nan_to_num(torch.inf).max()) / limit


def unused_tokens(model: Any, vocab_size: int | None) -> list[int]:
    """The ids of the head's padding: from ``vocab_size``, what the loss uses of it, to its last row. None: there are none.

    Heads are padded to a multiple of 64 or more, and nothing has trained those rows not to be sampled. The loss leaves them
    out (`popsd.PurifiedConfig.vocab_size`), so without them the samples follow the distribution that it sees.
    """
    rows = causal_model(model).config.get_text_config().vocab_size
    return [] if vocab_size is None else list(range(vocab_size, rows))


def check_head(model: Any, vocab_size: int | None) -> None:
    """Raise ValueError where ``vocab_size`` is more than the rows of the model's head."""
    rows = causal_model(model).config.get_text_config().vocab_size
    if vocab_size is not None and vocab_size > rows:
        raise ValueError(
            f"vocab_size: expected at most {rows}, the rows of the head; got {vocab_size}. Leave it out where the whole head "
            "is in use."
        )


def check_ends(eos_token_id: Sequence[int], vocab_size: int | None) -> None:
    """Raise ValueError where no end-of-sequence token is below ``vocab_size``: no completion would end."""
    if vocab_size is not None and min(eos_token_id) >= vocab_size:
        raise ValueError(
            f"vocab_size: expected more than an end-of-sequence token, one of {list(eos_token_id)}; got {vocab_size}. "
            "len(tokenizer) is the number of rows in use."
        )


def check_sampled(completions: Sequence[Sequence[int]], vocab_size: int | None) -> None:
    """Raise ValueError where a completion holds a token at or beyond ``vocab_size``. On a GPU the loss would not notice."""
    for row, ids in enumerate(completions):
        if vocab_size is not None and ids and max(ids) >= vocab_size:
            raise ValueError(
                f"generate: expected tokens below vocab_size={vocab_size}; got {max(ids)} in completion {row}. Suppress "
                "the others when sampling, or leave vocab_size out."
            )


def position_limit(model: Any) -> int | None:
    """The number of positions that a model has, or None where its configuration sets no limit, as that of BLOOM or Mamba.

    Past a table of positions the forward fails, on a GPU in a way that ends the process. Rotary positions have no table,
    but past the trained length the model's distributions are no longer those that it was trained for. Where they are
    scaled (YaRN), the limit is the scaled one.
    """
    config = causal_model(model).config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    longest = longest if longest and longest > 0 else None  # XLNet says -1
    rope = getattr(config, "rope_parameters", None) or {}
    original, factor = (rope.get(name) for name in ("original_max_position_embeddings", "factor"))
    if longest is not None and original and factor:
        longest = max(longest, int(original * factor))
    return longest


def check_positions(model: Any, prompts: Sequence[Prompts], max_new_tokens: int) -> None:
    """Raise ValueError where a prompt in any context, with ``max_new_tokens`` behind it, is longer than `position_limit`."""
    limit = position_limit(model)
    for row, built in enumerate(prompts):
        try:
            check_fits(built, max_new_tokens, limit)
        except ValueError as error:
            raise ValueError(f"prompts[{row}]: {error}") from error


def check_fits(prompts: Prompts, max_new_tokens: int, limit: int | None) -> None:
    """`check_positions` of one problem, for a model of ``limit`` positions."""
    name, longest = max(zip(prompts._fields, map(len, prompts), strict=True), key=lambda item: item[1])
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"expected at most the model's {limit} positions; got {longest} tokens in {name} and up to {max_new_tokens} "
            f"behind them. Set max_prompt_length={max(limit - max_new_tokens, 0)} and on_overflow, or sample fewer tokens. "
            "A model that extrapolates may say so in config.max_position_embeddings."
        )


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


def seed_everything(seed: int) -> None:
    """Seed the generators that `random_state` saves."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """States of the global generators: Python's, PyTorch's, and those of all CUDA devices."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Inside, the global generators, NumPy's too, begin at ``seed``. On leaving they are as they were before.

    So an evaluation changes nothing of the training around it, and all evaluations of a run draw the same numbers.
    """
    state, of_numpy = random_state(), np.random.get_state()
    seed_everything(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        set_random_state(state)
        np.random.set_state(of_numpy)
