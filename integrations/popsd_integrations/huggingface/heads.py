"""Head and last hidden states of any Hugging Face causal language model, without computing its logits.

What a model does between the projection and its logits is read from its configuration. The models name it differently,
and one name has two meanings: ``logits_scaling`` divides in Granite and MiniCPM, and multiplies in HyperCLOVA X.
``invariants.check_model`` compares the result with the model's own logits, so that an unknown architecture is refused and
not trained wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from popsd import Head
from popsd_integrations.huggingface.distributed import (
    check_reduced,
    check_seen,
    forward_as,
    is_around,
    is_running,
    run_in_forward,
    unwrapped,
)

_MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LOGITS_SCALING_MULTIPLIES = ("hyperclovax",)
_HEAD_FN = "popsd_head_fn"


def use_head(model: nn.Module, head_fn: Callable[[Any], Head]) -> None:
    """Hand over the head of a model where popsd cannot read it: from now on ``head_from_model`` calls ``head_fn``.

    head_fn: takes the Hugging Face model without any PEFT wrapper, and returns the `popsd.Head` that makes its logits of
        `hidden_states`. It is called again for every forward, with the adapter on or off. It is kept on the model, and a
        copy of the model has it too.

    >>> use_head(model, lambda causal: popsd.Head(causal.lm_head.weight))
    """
    setattr(causal_model(model), _HEAD_FN, head_fn)


def head_from_model(model: nn.Module) -> Head:
    """The head of a causal language model, in PEFT's and other wrappers or not. It holds the model's own parameters.

    The weight is [V, D] in the model's dtype, the bias [V] or None. Under an adapter that trains the head
    (``modules_to_save``) the answer depends on whether the adapter is on. For the frozen head call it inside the context
    that switches the adapter off. A head that FSDP2 shards is gathered, and its gradient goes back as FSDP2's mean.
    Raises ValueError for a head that is adapted or absent and for FSDP1 outside `run_in_forward`, TypeError for a head that
    is quantised.

    >>> list(head_from_model(model).weight.shape)
    [50, 16]
    """
    return gathered(local_head(model))


def local_head(model: nn.Module) -> Head:
    """`head_from_model`, but as this rank holds it: under FSDP2 a head of DTensors."""
    check_seen(model)
    causal = causal_model(model)
    head_fn = getattr(causal, _HEAD_FN, None)
    if head_fn is not None:
        head: Head = head_fn(causal)
        return head
    lm_head = _active_module(causal.get_output_embeddings())
    weight = getattr(lm_head, "weight", None)
    bias = getattr(lm_head, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise ValueError(
            f"model: expected a causal language model whose get_output_embeddings() has a weight of shape [V, D]; "
            f"got {type(lm_head).__name__} in {type(causal).__name__}. Load it with AutoModelForCausalLM, or hand over its "
            "popsd.Head with use_head(model, head_fn)."
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
    **further: Any,
) -> torch.Tensor:
    """Last hidden states [B, L, D] as the head takes them: no logits are computed, adapters are active.

    model: a causal language model, under PEFT or not, in DDP, in DeepSpeed's engine, or sharded by FSDP2. A wrapper is
        called as such, so that it gathers its shards and reduces the gradients. With `run_in_forward` that is done once for
        the whole loss, and FSDP1 works too.
    input_ids, attention_mask, position_ids: [B, L] int64, on the model's device. A model that takes no position_ids
        (ALiBi, state-space) is not given any. further: other arguments of the backbone's forward.
    Raises ValueError for a head that is not called on the states, for a prompt-learning adapter, for FSDP1 outside
    `run_in_forward`, and for a module in training whose wrapper was not passed: its gradients would never be reduced.

    >>> list(hidden_states(model, torch.tensor([[1, 2, 3]])).shape)
    [1, 3, 16]
    """
    causal = causal_model(model)
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **further}
    given = {name: value for name, value in given.items() if value is not None}
    return in_forward(model, lambda: _states(causal, given, position_ids))


def in_forward(model: nn.Module, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """``run``, which calls the backbone, inside the forward of whatever is around the model; raises as `hidden_states` does."""
    causal = causal_model(model)
    if is_running(causal):
        return run()
    check_seen(model)
    for wrapper in (model, causal):  # PEFT may be around a model that is sharded already
        if is_around(wrapper) or isinstance(wrapper, FSDPModule):
            return run_in_forward(wrapper, run)
    check_reduced(unwrapped(model))
    return run()


def _states(causal: Any, given: dict[str, Any], position_ids: torch.Tensor | None) -> torch.Tensor:
    """The backbone's states where the model is backbone and head; else what its own forward hands to its head."""
    backbone, lm_head = causal.base_model, causal.get_output_embeddings()
    plain = backbone is not causal and {*causal.children()} <= {backbone, lm_head}
    module = backbone if plain or (lm_head is None and backbone is not causal) else causal
    if position_ids is not None and _takes_position_ids(module):
        given = {**given, "position_ids": position_ids + _first_position(module)}
    if module is not causal:
        if type(backbone).forward.__module__.startswith("unsloth."):
            # Its forwards for a GPU (2026.10) drop the padding mask in training, unless labels or this say otherwise.
            backbone._unsloth_keep_padding_mask = True
        states: torch.Tensor = backbone(**given)[0]
        return states
    if lm_head is None:
        raise ValueError(
            f"model: expected a head that get_output_embeddings() returns; got none in {type(causal).__name__}. "
            "Load it with AutoModelForCausalLM."
        )
    taken: list[torch.Tensor] = []

    def take(states: torch.Tensor) -> torch.Tensor:
        taken.append(states)
        return states

    # The identity in the place of the head: what follows it in the model's forward costs D columns instead of V.
    with forward_as(lm_head, take):
        causal.forward(**given)
    if len(taken) != 1:
        raise ValueError(
            f"model: expected a forward of {type(causal).__name__} that calls its {type(lm_head).__name__} head once; got "
            f"{len(taken)} calls, so its hidden states are not known. popsd cannot train this architecture."
        )
    return taken[0]


def causal_model(model: Any) -> Any:
    """The Hugging Face model inside all wrappers, or the model itself. Raises ValueError on prompt learning."""
    model = unwrapped(model)
    if not hasattr(model, "get_base_model"):
        return model
    for name, adapter in model.peft_config.items():
        # These add virtual tokens in the wrapper's forward, and a call of the backbone would skip them silently.
        if adapter.is_prompt_learning or adapter.is_adaption_prompt:
            raise ValueError(
                f"model: expected a weight adapter such as LoRA; got the prompt-learning adapter {name!r} "
                f"({adapter.peft_type}). Train with LoraConfig instead."
            )
    return model.get_base_model()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside. On leaving, every module returns to the mode that it had.

    The layers of bitsandbytes keep theirs. They have no dropout, and on a CPU it chooses their arithmetic (0.50): 8-bit layers
    quantise their input in eval mode only, which moves logits by 2 % of the largest, and 4-bit layers are repacked for a
    kernel without a gradient where there is AVX512-BF16. The frozen weights would not be those that the student starts from.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    for module in was_training:
        module.training = type(module).__module__.split(".")[0] == "bitsandbytes"
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def gathered(head: Head, dtype: torch.dtype | None = None) -> Head:
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


def for_loss(model: nn.Module, head: Head, dtype: torch.dtype) -> Head:
    """The head of a model, or of its frozen weights, as a loss takes it, in ``dtype``.

    Where a tensor-parallel plan shares its rows out, it stays shared out, see docs/vocabulary_parallel.md; else `gathered`.
    """
    if not (isinstance(head.weight, DTensor) and is_tensor_parallel(model) and head.weight.placements == (Shard(0),)):
        return gathered(head, dtype)
    return Head(head.weight.to(dtype), head.bias, head.logit_scale, head.softcap)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether ranks share the weights for the same tokens. FSDP2 shards them too, but there each rank has tokens of its own."""
    sharded = any(isinstance(x, DTensor) for x in model.parameters())
    return sharded and not any(isinstance(x, FSDPModule) for x in model.modules())


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
    if getattr(config, "logits_mup_width_multiplier", None):  # Inkling and MiniCPM divide the states before the head
        scale /= float(config.logits_mup_width_multiplier)
    if getattr(config, "dim_model_base", None):
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


def _takes_position_ids(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def _first_position(module: nn.Module) -> int:
    """RoBERTa and its like count from the row after the one that their position embedding keeps for padding."""
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(part.padding_idx) + 1
    return 0


def own_logits(model: nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The model's own logits [T, V] at the completion of a row alone."""
    device = causal_model(model).get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *completion]], device=device)
    logits: torch.Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits


def tolerance(model: nn.Module) -> tuple[float, float]:
    """Largest error that rounding explains, relative to the largest logit, and the quantile over tokens that it is of."""
    parameters = list(model.parameters())
    on_gpu = any(p.device.type == "cuda" for p in parameters)
    narrow = any(not p.is_floating_point() or p.dtype.itemsize <= 2 for p in parameters)
    if narrow or (on_gpu and torch.backends.cuda.matmul.allow_tf32):
        return 2e-2, 0.5
    return (1e-3 if on_gpu else 1e-4), 1.0  # Triton kernels, such as Mamba's, round float32 to TF32 by default


def without_weights(config: Any, **options: Any) -> Any:
    """The causal language model of a configuration, of sizes alone. options: such as dtype, see ``from_config``."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)
