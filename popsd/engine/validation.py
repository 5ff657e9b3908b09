"""Validation: each error names the argument, what was expected, what came, and what to do. Nothing here computes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch.autograd import forward_ad

from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine.chunks.registry import checked_target
from popsd.engine.problem import NO_CLIP, Problem
from popsd.engine.tokens.checks import check_dense, may_look
from popsd.head import Head, is_shared
from popsd.outputs import HiddenStates

Streams = dict[str, torch.Tensor]
C = TypeVar("C", bound=DivergenceConfig)
E = TypeVar("E", bound=StrEnum)

_IMPLS = {member.value: member for member in Impl}
_METHODS = {member.value: member for member in Method}
_STRATEGIES = {member.value: member for member in Strategy}


def checked_config(config: DivergenceConfig | None, kind: type[C]) -> C:
    if config is not None and not isinstance(config, kind):
        raise TypeError(f"config: expected a popsd.{kind.__name__}; got {type(config).__name__}.")
    return kind() if config is None else config


def target_config(config: PurifiedConfig | TargetConfig | None) -> PurifiedConfig | TargetConfig:
    """Of a target composed of base, teacher and reference; a registered one is known and has all its numbers."""
    if not isinstance(config, TargetConfig):
        return checked_config(config, PurifiedConfig)
    return checked_target(config)


def two_distributions_config(config: DivergenceConfig | None) -> DivergenceConfig:
    if isinstance(config, TargetConfig):
        raise TypeError(
            "config: expected a popsd.DivergenceConfig, since one of the two is the target; got TargetConfig."
        )
    return checked_config(config, DivergenceConfig)


def check_purification(wanted: bool, config: DivergenceConfig) -> None:
    if not isinstance(wanted, bool):
        raise TypeError(f"telemetry: expected True or False; got {wanted!r}.")
    if wanted and isinstance(config, TargetConfig):
        raise ValueError(f"telemetry: expected False with the registered target {config.target!r}; got True.")


def checked_impl(impl: Impl | str, device: torch.device) -> Impl:
    """A known implementation that can run there; TRITON never falls back."""
    impl = _member("impl", impl, _IMPLS)
    if impl is Impl.TRITON:
        if find_spec("triton") is None:
            raise ValueError(
                "impl: 'triton' needs Triton, which is not installed. Install popsd[triton], or pass 'torch'."
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"impl: 'triton' expected tensors on a GPU that Triton drives; got {device}. Move them, pass 'torch', "
                "or set TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter."
            )
    return impl


HIDDEN = tuple(f"hidden.{name}" for name in HiddenStates._fields)
LOGITS = tuple(f"{name}_logits" for name in HiddenStates._fields)
"""What errors call four streams."""


def checked_hidden_type(hidden: HiddenStates) -> HiddenStates:
    if not isinstance(hidden, HiddenStates):
        raise TypeError(f"hidden: expected a popsd.HiddenStates; got {type(hidden).__name__}.")
    return hidden


def check_hidden(hidden: HiddenStates) -> None:
    """The four streams, all present."""
    missing = [name for name, x in zip(HIDDEN, checked_hidden_type(hidden), strict=True) if x is None]
    if missing:
        raise ValueError(
            f"{missing[0]}: expected a tensor; got None. The purified target needs all four streams; "
            "for the teacher alone as target use popsd.linear_jsd."
        )


def named_streams(streams: HiddenStates, names: Sequence[str]) -> Streams:
    """Those that are there, by what errors call them."""
    return {name: x for name, x in zip(names, streams, strict=True) if x is not None}


def check_streams(streams: Streams) -> torch.Size:
    """Floating tensors of one rank, with equal leading shapes, on one device. Returns that leading shape."""
    for name, x in streams.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}.")
        check_dense(name, x)
        if not x.is_floating_point() or x.dtype == torch.float64:
            raise TypeError(
                f"{name}: expected float32, bfloat16 or float16; got {x.dtype}. Convert it; popsd.oracle computes in float64."
            )
        if x.ndim not in (2, 3):
            raise ValueError(f"{name}: expected shape [N, D] or [B, T, D]; got {list(x.shape)}.")
    first, tensor = next(iter(streams.items()))
    for name, x in streams.items():
        if x.shape[:-1] != tensor.shape[:-1]:
            raise ValueError(
                f"{name}: expected the tokens of {first}, {list(tensor.shape[:-1])}; got {list(x.shape[:-1])}. "
                "All streams hold the same completion positions; gather them before the call."
            )
        if x.device != tensor.device:
            raise ValueError(
                f"{name}: expected device {tensor.device} like {first}; got {x.device}. Move it with .to()."
            )
    return tensor.shape[:-1]


def check_transforms(streams: Streams, heads: tuple[Head, Head] | None) -> None:
    """No tensor of torch.func or of forward-mode differentiation, whose derivatives the operator would drop."""
    if torch.compiler.is_compiling():
        return
    tensors = [*streams.values(), *(x for head in heads or () for x in (head.weight, head.bias) if x is not None)]
    for x in tensors:
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "popsd: expected plain tensors, since a loss has a reverse-mode derivative alone; got one inside a torch.func "
                "transform or a dual number. Use loss.backward() or torch.autograd.grad, and a loop for torch.func.vmap."
            )


def check_vocabulary(streams: Streams, heads: tuple[Head, Head] | None, config: DivergenceConfig) -> int:
    """One vocabulary, of the given logits or of both heads, and heads that fit their streams. Returns how much is in use."""
    if heads is None:
        sizes = {name: x.shape[-1] for name, x in streams.items()}
        if len(set(sizes.values())) > 1 or not all(sizes.values()):
            raise ValueError(
                f"{next(iter(sizes))}: expected one non-empty vocabulary for all logits; got {sizes}. "
                "Cut padded logits to the common vocabulary first."
            )
        rows = next(iter(sizes.values()))
    else:
        rows = _check_heads(streams, heads, config)
    if config.vocab_size is not None and config.vocab_size > rows:
        raise ValueError(f"config.vocab_size: expected at most the {rows} rows there are; got {config.vocab_size}.")
    return config.vocab_size or rows


def _check_heads(streams: Streams, heads: tuple[Head, Head], config: DivergenceConfig) -> int:
    """The first stream belongs to the first head, the others to the second. Returns the rows that both heads have."""
    for i, (name, x) in enumerate(streams.items()):
        head = heads[min(i, 1)]
        label = ("student_head", "frozen_head")[min(i, 1)]
        check_head(label, head)
        width = head.weight.shape[1]
        if x.shape[-1] != width:
            raise ValueError(
                f"{name}: expected width {width} of {label}.weight {list(head.weight.shape)}; got {list(x.shape)}. "
                "Pass the last hidden states, after the final norm, and the head that belongs to them."
            )
        if head.weight.device != x.device:
            raise ValueError(
                f"{label}: expected device {x.device} like {name}; got {head.weight.device}. Move it with .to()."
            )
    sizes = [head.weight.shape[0] for head in heads]
    if config.vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"frozen_head: expected the student's vocabulary of {sizes[0]} rows; got {sizes[1]}. "
            "Set config.vocab_size to the common number of leading rows if the rest is padding."
        )
    return min(sizes)


def check_head(label: str, head: Head) -> None:
    if not isinstance(head, Head):
        raise TypeError(f"{label}: expected a popsd.Head; got {type(head).__name__}. Wrap the lm_head's weight in one.")


def checked_reduction(reduction: str) -> Literal["none", "sum"]:
    if reduction == "none":
        return "none"
    if reduction == "sum":
        return "sum"
    raise ValueError(f"reduction: expected 'none' or 'sum'; got {reduction!r}. popsd.PurifiedOPSDLoss offers means.")


def checked_strategy(strategy: Strategy | str) -> Strategy:
    return _member("strategy", strategy, _STRATEGIES)


_LARGEST_CLIP = 1e3


def check_pmi_clip(problem: Problem, impl: Impl) -> None:
    """A tanh that the backend, resolved, has digits for. That of the kernels is off by 2e-7 of its bound, see `soft_clip`."""
    clip = problem.options.pmi_clip
    if impl is Impl.TRITON and clip is not None and _LARGEST_CLIP < clip <= NO_CLIP:
        raise ValueError(
            f"pmi_clip: expected at most {_LARGEST_CLIP:g} with the Triton kernels, whose tanh is off by 2e-7 of it; got "
            f"{clip:g}. Pass pmi_clip=None, which limits nothing, or impl='torch'."
        )


def check_strategy(problem: Problem, impl: Impl) -> None:
    """A strategy that can do this case. ``impl`` is resolved."""
    options, tensors = problem.options, problem.tensors
    if options.strategy == Strategy.CHUNKED.value:
        return
    streaming, obstacle = options.strategy == Strategy.STREAMING.value, None
    if options.vocab_group is not None:
        obstacle = "the whole vocabulary on this rank: no vocab_group and no DTensor head"
    elif impl is not Impl.TRITON:
        obstacle = "Triton kernels: pass impl='triton' on a GPU"
    elif tensors.student_weight is None:
        obstacle = "hidden states and a head, not logits"
    elif problem.needs_separate_logits or problem.needs_reference_logits:
        obstacle = (
            "teacher and reference as one difference: no soft cap, centred or without pmi_clip and plausibility, "
            "no tail_floor, no registered target, telemetry=False, decompose=False or 'gram'"
        )
    elif not streaming and options.renyi_alpha is not None:
        obstacle = "a configuration without renyi_alpha, for which its kernel has not the registers"
    elif streaming and problem.masks_entries:
        obstacle = "a configuration without plausibility: it never holds a row's logits to look for the largest"
    elif streaming and problem.is_purified and options.exact_difference:
        obstacle = "exact_difference=False"
    elif not streaming and not (problem.is_purified and tensors.student_bias is None and problem.frozen_bias is None):
        obstacle = "the purified target and heads without bias"
    if obstacle is not None:
        raise ValueError(f"strategy: '{options.strategy}' needs {obstacle}. Otherwise use strategy='chunked'.")


def checked_method(
    decompose: bool | Method | str, heads: tuple[Head, Head] | None, *, argument: str = "decompose"
) -> Method | None:
    """How to decompose, None for not at all; GRAM only where one head without soft cap serves all streams."""
    if isinstance(decompose, bool):
        return Method.LOGITS if decompose else None
    method = _member(argument, decompose, _METHODS)
    if method is Method.GRAM:
        obstacle = gram_obstacle(heads)
        if obstacle is not None:
            raise ValueError(f"{argument}: 'gram' needs {obstacle}. Otherwise use 'logits'.")
    return method


def gram_obstacle(heads: tuple[Head, Head] | None) -> str | None:
    """Why the decomposition is no quadratic form of hidden states here; None where it is one."""
    if heads is None:
        return "hidden states and a head, not logits"
    own, frozen = heads
    if not is_shared(own, frozen):
        return "one head for student, teacher and reference, as under LoRA: frozen_head=None"
    if own.softcap is not None or frozen.softcap is not None:
        return "a head without soft cap, which is not linear"
    return None


def checked_gram(
    gram: torch.Tensor | None, method: Method | None, head: Head | None, argument: str = "decompose"
) -> torch.Tensor | None:
    """A caller's own Gram matrix, which only the decomposition by it reads."""
    if gram is None:
        return None
    if method is not Method.GRAM or head is None:
        raise ValueError(
            f"gram: expected None unless {argument} is 'gram' or a mask needs it; got a tensor. Leave it out."
        )
    if not isinstance(gram, torch.Tensor):
        raise TypeError(f"gram: expected a torch.Tensor from popsd.gram_matrix; got {type(gram).__name__}.")
    width = head.weight.shape[1]
    if gram.shape != (width, width) or gram.dtype != torch.float32 or gram.device != head.weight.device:
        raise ValueError(
            f"gram: expected float32 of shape [{width}, {width}] on {head.weight.device}, the head's; got {gram.dtype} of "
            f"shape {list(gram.shape)} on {gram.device}. Form it with popsd.gram_matrix from the same head."
        )
    return gram.detach()


def method_for_masks(method: Method | None, masks: MaskConfig | None, heads: tuple[Head, Head] | None) -> Method | None:
    """The decomposition asked for, or the cheapest one that the masks can read."""
    if masks is None or not masks.reads_decomposition:
        return method
    if method is None:
        return Method.GRAM if masks.signal == "centred" and gram_obstacle(heads) is None else Method.LOGITS
    if method is Method.GRAM and masks.signal != "centred":
        raise ValueError(
            f"decompose: expected True, since the masks read the {masks.signal} decomposition; got 'gram', which knows "
            "the centred one alone. Pass decompose=True, or MaskConfig(signal='centred')."
        )
    return method


def check_workspace(workspace_mib: float | None) -> None:
    if workspace_mib is not None and not isinstance(workspace_mib, int | float):
        raise TypeError(f"workspace_mib: expected a number of MiB or None; got {type(workspace_mib).__name__}.")
    if workspace_mib is not None and not 0 < workspace_mib < float("inf"):
        raise ValueError(f"workspace_mib: expected a positive number of MiB or None; got {workspace_mib}.")


def check_finite(
    streams: Streams,
    weights: torch.Tensor | None,
    config: DivergenceConfig,
    *,
    heads: tuple[Head, Head] | None,
    vocab_size: int,
) -> None:
    """No NaN and no inf in tokens that count, nor in the rows of the heads in use. -inf is an impossible token in given logits
    and in a bias, not an error. Weights are looked at where that is asked for by name: it reads all of them.
    """
    if not (may_look(next(iter(streams.values()))) if config.check_finite is None else config.check_finite):
        return
    for name, stream in streams.items():
        x = stream if heads is not None else stream[..., :vocab_size]
        # a sum is finite exactly when no entry is NaN or inf, short of overflow: one cheap pass when all is well
        if torch.isfinite(x.detach().sum(dtype=torch.float32)):
            continue
        bad = ~torch.isfinite(x.detach())
        if heads is None:
            bad &= ~torch.isneginf(x.detach())
        rows = bad.flatten(0, -2).any(dim=1)
        if weights is not None:
            rows &= weights != 0
        if rows.any():
            first = int(rows.nonzero()[0])
            where = f"row {first}" if x.ndim == 2 else f"row {list(divmod(first, x.shape[1]))} of [B, T]"
            raise ValueError(
                f"{name}: expected finite values; got NaN or inf first in {where} ({int(rows.sum())} rows in all). "
                "Mask padding with weights = 0, or look for overflow in that forward pass."
            )
    for label, head in zip(("student_head", "frozen_head"), heads or (), strict=False):
        bias = None if head.bias is None else head.bias.detach()[:vocab_size]
        if bias is not None and not (bias < float("inf")).all():
            raise ValueError(
                f"{label}.bias: expected finite values, or -inf for impossible tokens; got NaN or inf first in row "
                f"{int((~(bias < float('inf'))).nonzero()[0])}. Look for the step after which it is not finite."
            )
        weight = head.weight.detach()[:vocab_size]
        if config.check_finite and not torch.isfinite(weight.sum(dtype=torch.float32)):
            bad = ~torch.isfinite(weight).all(dim=1)
            if bad.any():  # the sum alone may have overflowed
                raise ValueError(
                    f"{label}.weight: expected finite values; got NaN or inf first in row {int(bad.nonzero()[0])} "
                    f"({int(bad.sum())} rows in all). Set config.vocab_size if these are padding."
                )


def _member(argument: str, value: str, members: Mapping[str, E]) -> E:
    """The member of an enumeration, which may be given as its value.

    Looked up by its value, not constructed: torch.compile before 2.13 cannot trace the call of an enumeration's class where the
    value is a member already (2.11, arguments that come from a NamedTuple's defaults), and 2.8 takes members for no str.
    """
    key = value.value if isinstance(value, StrEnum) else value
    member = members.get(key) if isinstance(key, str) else None
    if member is None:
        raise ValueError(f"{argument}: expected one of {list(members)}; got {value!r}.")
    return member
