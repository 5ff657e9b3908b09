"""What must hold of a model before it is trained, proved on real prompts with a few small forwards.

The loss compares distributions of one model over the same tokens in different contexts. It is wrong, and says nothing,
where the states and the head are not the model's, where padding or the future changes a token's distribution, and where the
frozen weights are not those that the student starts from. All of this depends on the architecture and on how it was loaded,
so it is measured on the model at hand and not looked up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from popsd import head_logits
from popsd_integrations.huggingface.distributed import run_in_forward, unwrapped
from popsd_integrations.huggingface.frozen import FrozenWeights
from popsd_integrations.huggingface.heads import (
    causal_model,
    eval_mode,
    head_from_model,
    hidden_states,
    is_sharded,
    own_logits,
    tolerance,
)
from popsd_integrations.huggingface.packing import Packed, pack
from popsd_integrations.huggingface.prompts import Prompts

logger = logging.getLogger(__name__)

_SIDES = ("left", "right")
_KEPT = (8, 24)  # first and last tokens of a longer prompt
_SAME = 1e-5  # nats. An adapter that starts at zero, and a copy, give the very same logits.


def check_model(
    model: nn.Module,
    prompts: Sequence[Prompts] = (),
    frozen: FrozenWeights | None = None,
    *,
    pad_token_id: int = 0,
    sides: Sequence[str] = _SIDES,
) -> str:
    """Prove that popsd computes this model's own distributions; return the padding side on which it does.

    A question, a teacher prompt and a reference prompt of different lengths, each with a few tokens behind it, are padded to
    one batch. Then, at the tokens behind:

    - states and head give the logits that the model gives for each row alone, on the left or on the right;
    - no position sees the tokens after it;
    - in the mode that the model is in it computes what it computes in eval mode; else a warning names the dropout;
    - the frozen source gives the student's distributions, and reads nothing that is trained;
    - the gradient of every trained parameter is finite. Left out without a frozen source, and of sharded parameters.

    prompts: two of them are used; none stands for token ids spread over the vocabulary. frozen: what `frozen_weights`
        returns; None checks the model alone. pad_token_id: as in training. sides: which are tried, the preferred one first.
    Tolerances are relative to the largest logit: in float32 1e-4, on a GPU 1e-3; for 16-bit, TF32 and quantised weights 2e-2
    in the median over tokens, because their rounding may also send a token to another expert. The target is a difference of
    two logits, so an error of theirs counts about tenfold in the loss.
    Raises ValueError for each of these, with its remedy. Modes, gradients and random states are left as they are.

    >>> check_model(model, [Prompts([1, 2], [1, 2, 3, 4], [3, 4])], frozen_weights(model))
    'left'
    """
    model = unwrapped(model)
    rows = _rows(model, prompts)
    with _no_trace(model):
        with eval_mode(model), torch.no_grad():
            own = [own_logits(model, *row) for row in rows]
            side, logits = _exact_side(model, rows, own, pad_token_id, sides)
            packed = _packed(model, rows, pad_token_id, side)
            _check_causality(model, packed, logits)
        _check_modes(model, packed, logits)
        if frozen is None:
            return side
        _check_frozen(model, frozen, packed, logits)
        bad = _bad_gradients(model, packed)
        for other in sides if bad else ():
            there = _packed(model, rows, pad_token_id, other)
            if other != side and _is_exact(model, there, own) and not _bad_gradients(model, there):
                return other
    if bad:
        raise ValueError(
            f"model: expected finite gradients over padded rows; got NaN or infinity in {len(bad)} parameters, such as "
            f"{bad[0]}. {type(causal_model(model)).__name__} divides by the norm of the pad token's embedding, which may be "
            "zero. Choose a pad token with another embedding (tokenizer.pad_token)."
        )
    return side


def check_head(model: nn.Module) -> None:
    """Raise ValueError where the model's states and head do not give its own logits, for a row of token ids alone.

    The first of what `check_model` proves, for a loss that never pads, or leaves padding to others.
    """
    model = unwrapped(model)
    rows = _rows(model, ())
    with _no_trace(model), eval_mode(model), torch.no_grad():
        _check_alone(model, rows, [own_logits(model, *row) for row in rows], 0)


def _exact_side(
    model: nn.Module, rows: list[Any], own: list[torch.Tensor], pad_token_id: int, sides: Sequence[str]
) -> tuple[str, torch.Tensor]:
    """The side to pad on, and the logits there: the first one, unless another is exact and this one is not."""
    limit, _ = tolerance(model)
    errors: dict[str, float] = {}
    found: dict[str, torch.Tensor] = {}
    raised: dict[str, Exception] = {}
    for side in sides:
        try:
            found[side] = _logits(model, _packed(model, rows, pad_token_id, side))
            # A pad token whose embedding is zero, as a fresh one's is, can hide for now that padding is seen.
            ordinary = _logits(model, _packed(model, rows, rows[0][0][0], side))
            errors[side] = max((_error(model, x, own) for x in (ordinary, found[side])), key=_nan_last)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an architecture may not take padding there at all
            errors[side], raised[side] = math.inf, error
    first = sides[0]
    best = min(errors, key=lambda side: _nan_last(errors[side]))
    # Rounding differs between the sides too. Another one is taken only where the first one's error is more than that. In 8 bits
    # (LLM.int8) it depends on what else is in the batch, by 1 % of the largest logit (bitsandbytes 0.50, six tiny models).
    rounding = limit if any(p.dtype == torch.int8 for p in model.parameters()) else limit / 3
    side = first if errors[first] <= max(rounding, 4 * errors[best]) else best
    if errors[side] <= limit:
        if side != "left" and "left" in sides:
            logger.warning(
                f"{type(causal_model(model)).__name__} sees padding on the left (logits off by {errors['left']:.2g} of the "
                "largest), so the loss pads on the right, and prompts of one length are sampled at a time. A generate function "
                "of your own must do so too, or its completions are of another distribution."
            )
        return side, found[side]
    if side in raised and len(raised) == len(sides):
        raise raised[side]
    _check_alone(model, rows, own, pad_token_id)
    shown = ", ".join(f"{error:.3g} on the {name}" for name, error in errors.items())
    raise ValueError(
        f"model: expected padding that {type(causal_model(model)).__name__} does not see, on one side at least; its logits are "
        f"off by {shown}, relative to the largest. This architecture cannot be trained in padded batches."
    )


def _check_alone(model: nn.Module, rows: list[Any], own: list[torch.Tensor], pad_token_id: int) -> None:
    """Raise ValueError where a row without padding is wrong already, which makes it the head's fault."""
    logits = _logits(model, _packed(model, rows[-1:], pad_token_id, "left"))
    error = _error(model, logits, own[-1:])
    limit, _ = tolerance(model)
    if not error <= limit:
        raise ValueError(
            f"model: expected the head read from {type(causal_model(model)).__name__} to give the model's own logits within "
            f"{limit:g}; got a relative difference of {error:.3g}, shapes {list(logits.shape[1:])} and "
            f"{list(own[-1].shape)}. This architecture transforms its hidden states or logits in a way popsd does not "
            "know; hand over the popsd.Head that does it with use_head(model, head_fn)."
        )


def _check_causality(model: nn.Module, packed: Packed, logits: torch.Tensor) -> None:
    """Another last token must not change what predicts the tokens up to it."""
    last = packed.spans[:, 1:] - 1
    ids = packed.input_ids.scatter(1, last, packed.input_ids.gather(1, packed.spans[:, :1]))
    changed = _logits(model, packed._replace(input_ids=ids))
    limit, _ = tolerance(model)
    error = _error(model, changed, _by_row(packed, logits))
    if not error <= limit:
        raise ValueError(
            f"model: expected a causal language model; in {type(causal_model(model)).__name__} the logits of a token change by "
            f"{error:.3g} of the largest with the token after it. Load it as a decoder (is_decoder=True in its config)."
        )


def _check_modes(model: nn.Module, packed: Packed, logits: torch.Tensor) -> None:
    """Warn of dropout, also of one that is no module; raise ValueError where train mode differs for another reason."""
    if not any(module.training for module in model.modules()):
        return
    with torch.no_grad():
        error = _error(model, _logits(model, packed), _by_row(packed, logits))
    names = [f"{name}.p" for name, module in model.named_modules() if _drops(module)]
    differs = not error <= tolerance(model)[0]
    if differs and not names:
        config = causal_model(model).config.get_text_config().to_dict()
        numbers = {name: value for name, value in config.items() if isinstance(value, int | float)}
        names = [
            f"config.{name}" for name, value in numbers.items() if value > 0 and ("drop" in name or "jitter" in name)
        ]
    if names:
        logger.warning(
            f"The student has dropout ({names[0]} and {len(names)} in all; train mode and eval mode differ by {error:.2g} of "
            "the largest logit): its completions are then sampled from another model than the one trained. Set it to 0, such "
            "as lora_dropout=0.0."
        )
    elif differs:
        raise ValueError(
            f"model: expected the same logits in train mode and in eval mode; {type(causal_model(model)).__name__} differs by "
            f"{error:.3g} of the largest, and no dropout is known that does it. Train it in eval mode."
        )


def _check_frozen(model: nn.Module, frozen: FrozenWeights, packed: Packed, logits: torch.Tensor) -> None:
    """The frozen source gives the student's distributions, and depends on nothing that is trained."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "model: expected parameters that require grad; got none. Load an adapter with is_trainable=True, "
            "or call requires_grad_(True)."
        )
    with frozen.weights() as source, torch.no_grad():
        # PEFT switches the flags of its own parameters off with the adapter, so what is left is trained beside it.
        beside = [name for name, p in source.named_parameters() if id(p) in trained and p.requires_grad]
        theirs = _logits(source, packed)
        head = head_from_model(source)
    if beside:
        raise ValueError(
            f"model: expected that only an adapter is trained where the frozen weights are the model without it; got "
            f"{len(beside)} trained parameters of the model itself, such as {beside[0]}. The frozen weights would move with "
            "them. Use bias='none', name whole modules in modules_to_save, leave the rest frozen, or keep FrozenCopy's or "
            "teacher_model's weights apart."
        )
    if any(p.data_ptr() == head.weight.data_ptr() for p in model.parameters() if id(p) in trained):
        raise ValueError(
            "model: expected frozen weights whose head is not trained; got the student's own. A head_fn of use_head must read "
            "the model that it is given, not one from around it."
        )
    if head.weight.dtype != (own := head_from_model(model).weight.dtype):
        raise ValueError(
            f"frozen: expected weights in the student's {own}; got {head.weight.dtype}. Load both in one dtype, or the student "
            "starts away from its own base."
        )
    log_p, log_q = (x[packed.completion_mask].log_softmax(-1) for x in (logits, theirs))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).max().item()
    if not divergence <= _SAME:
        raise ValueError(
            f"frozen: expected the weights that the student starts from, a divergence of 0; got {divergence:.3g} nats. "
            + _cause(model)
        )


def _cause(model: nn.Module) -> str:
    for adapter in getattr(model, "peft_config", {}).values():
        how = getattr(adapter, "init_lora_weights", True)
        if how not in (True, "gaussian", "orthogonal"):
            return (
                f"init_lora_weights={how!r} starts the adapter away from zero, or rewrites the weights under it. Use "
                "init_lora_weights=True."
            )
    if hasattr(model, "peft_config"):
        return (
            "The adapter is trained already. Merge it (merge_and_unload) and train a new one; to go on with a run, start it "
            "from the initial model and resume from its checkpoint."
        )
    return "Build the frozen weights from the student before it is trained, and in its dtype."


def _bad_gradients(model: nn.Module, packed: Packed) -> list[str]:
    """Trained parameters whose gradient is not finite over the padded batch."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if any(map(is_sharded, model.parameters())):  # FSDP2 and ZeRO-3 reduce gradients where autograd.grad does not look
        return []
    with torch.enable_grad():
        # As a forward of its own, because hidden_states asks for the DDP wrapper, and this gradient must not reach it.
        states = run_in_forward(model, lambda: _states(model, packed))
        states = packed.predicting(states)[packed.completion_mask]
        if not states.requires_grad:  # only the head is trained
            return []
        found = torch.autograd.grad(states.float().square().mean(), [p for _, p in named], allow_unused=True)
    return [name for (name, _), x in zip(named, found, strict=True) if x is not None and not torch.isfinite(x).all()]


def _rows(model: nn.Module, prompts: Sequence[Prompts]) -> list[tuple[list[int], list[int]]]:
    """Three prompts with completions, the longest last. Their contexts and lengths differ."""
    if not prompts:
        vocab_size = causal_model(model).get_input_embeddings().weight.shape[0]
        spread = [3 + index * (vocab_size - 4) // 17 for index in range(18)] if vocab_size > 21 else [1] * 18
        prompts = [Prompts(spread[:3], spread, spread[3:9])]
    first, second = prompts[0], prompts[min(1, len(prompts) - 1)]
    tail = [*second.reference, *second.teacher]
    lengths = (7, 4, 5)
    contexts = sorted((first.question, second.reference, first.teacher), key=len)
    rows = []
    for ids, length in zip(contexts, lengths, strict=True):
        kept = list(ids) if len(ids) <= sum(_KEPT) else [*ids[: _KEPT[0]], *ids[-_KEPT[1] :]]
        rows.append((kept, [tail[i % len(tail)] for i in range(length)]))
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))


def _packed(model: nn.Module, rows: list[Any], pad_token_id: int, side: str) -> Packed:
    device = causal_model(model).get_input_embeddings().weight.device
    return pack([p for p, _ in rows], [c for _, c in rows], pad_token_id=pad_token_id, side=side, device=device)


def _states(model: nn.Module, packed: Packed) -> torch.Tensor:
    return hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)


def _logits(model: nn.Module, packed: Packed) -> torch.Tensor:
    """Logits [B, T, V] at the completions, as the loss computes them."""
    states, head = packed.predicting(_states(model, packed)), head_from_model(model)
    return head_logits(states.flatten(0, 1).to(head.weight.dtype), head).unflatten(0, states.shape[:2])


def _is_exact(model: nn.Module, packed: Packed, own: list[torch.Tensor]) -> bool:
    with eval_mode(model), torch.no_grad():
        return _error(model, _logits(model, packed), own) <= tolerance(model)[0]


def _by_row(packed: Packed, logits: torch.Tensor) -> list[torch.Tensor]:
    return [x[mask] for x, mask in zip(logits, packed.completion_mask, strict=True)]


def _error(model: nn.Module, logits: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """Difference relative to the largest logit, of the worst row; NaN where there is one."""
    _, over_tokens = tolerance(model)
    errors = []
    for found, own in zip(logits, expected, strict=True):
        if found.shape[-1] != own.shape[-1]:
            return math.inf
        by_token = (found[: len(own)] - own).abs().amax(-1) / own.abs().max().clamp(min=1e-6)
        errors.append(by_token.quantile(over_tokens).item())
    return max(errors, key=_nan_last)


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _drops(module: nn.Module) -> bool:
    return "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """The generators' states afterwards are those of before, because dropout may draw."""
    device = causal_model(model).get_input_embeddings().weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
