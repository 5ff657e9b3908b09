"""Head and last hidden states of any Hugging Face causal language model, without computing its logits.

What a model does between the projection and its logits is read from its configuration. The models name it differently,
and one name has two meanings: ``logits_scaling`` divides in Granite and MiniCPM, and multiplies in HyperCLOVA X.
``check_head`` compares the result with the model's own logits, so that an unknown architecture is refused and not trained
wrongly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from popsd import Head

_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LOGITS_SCALING_MULTIPLIES = ("hyperclovax",)


def head_from_model(model: nn.Module) -> Head:
    """The head of a causal language model, PEFT-wrapped or not. It holds the model's own parameters, not copies.

    The weight is [V, D] in the model's dtype, the bias [V] or None. Under an adapter that trains the head
    (``modules_to_save``) the answer depends on whether the adapter is on. For the frozen head call it inside the context
    that switches the adapter off.
    Raises ValueError for a head that is adapted or absent, TypeError for one that is quantised.

    >>> list(head_from_model(model).weight.shape)
    [50, 16]
    """
    causal = causal_model(model)
    lm_head = _active_module(causal.get_output_embeddings())
    weight = getattr(lm_head, "weight", None)
    bias = getattr(lm_head, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise ValueError(
            f"model: expected a causal language model whose get_output_embeddings() has a weight of shape [V, D]; "
            f"got {type(lm_head).__name__} in {type(causal).__name__}. Load it with AutoModelForCausalLM."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"model: expected an lm_head of 16 bits or more, floating; got {weight.dtype} in "
            f"{type(lm_head).__name__}. Load the model with the head unquantised (llm_int8_skip_modules=['lm_head'])."
        )
    config = causal.config.get_text_config()
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    # Inkling drops the padding rows from its logits; a view of the leading rows does the same.
    rows = getattr(config, "unpadded_vocab_size", None) or weight.shape[0]
    return Head(
        weight[:rows] if rows != weight.shape[0] else weight,
        bias if bias is None or rows == weight.shape[0] else bias[:rows],
        logit_scale=_logit_scale(config),
        softcap=softcap,
    )


def hidden_states(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states [B, L, D] as the head takes them: the backbone without the head, adapters active.

    input_ids, attention_mask, position_ids: [B, L] int64, on the model's device. A model that takes no position_ids
        (ALiBi, state-space) is not given any.
    Raises ValueError for a model without a backbone under its head, and for a prompt-learning adapter.

    >>> list(hidden_states(model, torch.tensor([[1, 2, 3]])).shape)
    [1, 3, 16]
    """
    causal = causal_model(model)
    backbone = causal.base_model
    if backbone is causal:
        raise ValueError(
            f"model: expected a backbone under the lm_head (base_model_prefix); got none in {type(causal).__name__}. "
            "Load it with AutoModelForCausalLM."
        )
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None and _takes_position_ids(backbone):
        arguments["position_ids"] = position_ids
    states: torch.Tensor = backbone(**arguments)[0]
    return states


def causal_model(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself. Raises ValueError on prompt learning."""
    if not hasattr(model, "peft_config"):
        return model
    for name, adapter in model.peft_config.items():
        # These add virtual tokens in the wrapper's forward, and a call of the backbone would skip them silently.
        if adapter.is_prompt_learning or adapter.is_adaption_prompt:
            raise ValueError(
                f"model: expected a weight adapter such as LoRA; got the prompt-learning adapter {name!r} "
                f"({adapter.peft_type}). Train with LoraConfig instead."
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_head(model: nn.Module, *, tolerance: float = 1e-2) -> None:
    """Compare ``head_from_model(model)`` on ``hidden_states`` with the model's own logits on four tokens.

    tolerance: relative to the largest logit. bf16 rounds at 4e-3, and a missed scale or softcap is off by far more.
    Raises ValueError where they disagree, because the loss would be taken of other distributions than the model's.

    >>> check_head(model)
    """
    head = head_from_model(model)
    causal = causal_model(model)
    vocab_size = causal.get_input_embeddings().weight.shape[0]
    input_ids = torch.tensor([[index * (vocab_size - 1) // 3 for index in range(4)]], device=head.weight.device)
    with eval_mode(model), torch.no_grad():
        expected = model(input_ids=input_ids).logits.float()
        states = hidden_states(model, input_ids).to(head.weight.dtype)
        logits = nn.functional.linear(states, head.weight, head.bias).float() * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
    error = math.inf
    if expected.shape == logits.shape:
        error = ((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    if not error <= tolerance:
        raise ValueError(
            f"model: expected the head read from {type(causal).__name__} to give the model's own logits within "
            f"{tolerance:g}; got a relative difference of {error:.3g}, shapes {list(logits.shape)} and "
            f"{list(expected.shape)}. This architecture transforms its hidden states or logits in a way popsd does not "
            "know; build the popsd.Head by hand."
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside. On leaving, every module returns to the mode that it had."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def gathered(head: Head, dtype: torch.dtype) -> Head:
    """The head as plain tensors: a head that FSDP2 shards by itself is gathered here, once, in ``dtype``.

    Its gradient goes back as the mean over the ranks, which is how FSDP2 reduces every other parameter's.
    """
    if not isinstance(head.weight, DTensor):
        return head
    bias = None if head.bias is None else _full(head.bias)
    return Head(_full(head.weight).to(dtype), bias, head.logit_scale, head.softcap)


def _full(parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # Each rank's gradient is of its own tokens, hence Partial. full_tensor() alone takes it to be the same everywhere.
    full: torch.Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def held(head: Head) -> Head:
    """A head that outlives the forward it was gathered for: under ZeRO-3, other tensors over the same memory.

    On leaving that forward ZeRO-3 points the parameter to an empty tensor. The memory it pointed to before stays.
    """
    if not is_sharded(head.weight):
        return head
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, head.logit_scale, head.softcap)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a rank holds only a part of a parameter outside its module's forward, as under FSDP2 and ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def same_head(a: Head, b: Head) -> bool:
    """Whether two heads are the same tensors with the same transforms: then one projection serves both."""
    return (
        _same_tensor(a.weight, b.weight)
        and _same_tensor(a.bias, b.bias)
        and (a.logit_scale, a.softcap) == (b.logit_scale, b.softcap)
    )


def _same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    if isinstance(a, DTensor) or isinstance(b, DTensor):
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _logit_scale(config: Any) -> float:
    scale = 1.0
    for name in _MULTIPLIES:
        if getattr(config, name, None) is not None:
            scale *= float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        multiplies = str(getattr(config, "model_type", "")).startswith(_LOGITS_SCALING_MULTIPLIES)
        return scale * float(scaling) if multiplies else scale / float(scaling)
    if getattr(config, "dim_model_base", None):  # MiniCPM divides the hidden states before the head
        scale *= config.dim_model_base / config.hidden_size
    return scale


def _active_module(lm_head: Any) -> Any:
    """The module that computes the logits now: the head, or PEFT's trained copy of it where the adapter is on."""
    if hasattr(lm_head, "modules_to_save") and hasattr(lm_head, "original_module"):
        if lm_head.disable_adapters:
            return lm_head.original_module
        return (
            lm_head.modules_to_save[lm_head.active_adapters[0]] if lm_head.active_adapters else lm_head.original_module
        )
    if hasattr(lm_head, "base_layer") or hasattr(lm_head, "token_adapter"):
        raise ValueError(
            f"model: expected an lm_head without an adapter on it; got {type(lm_head).__name__}. "
            "Leave lm_head out of target_modules and of trainable_token_indices; modules_to_save can train it."
        )
    return lm_head


def _takes_position_ids(backbone: nn.Module) -> bool:
    return "position_ids" in inspect.signature(backbone.forward).parameters
