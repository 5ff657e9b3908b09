"""The frozen initial weights, and the three forwards over them that make the target.

A source of frozen weights is a small class whose ``weights()`` is a context manager. It yields the model to run. The head
is fetched inside that context, because an adapter that trains the head (``modules_to_save``) has another head outside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from popsd import Head
from popsd_integrations.huggingface.distributed import check_seen, unwrapped
from popsd_integrations.huggingface.forwards import completion_states
from popsd_integrations.huggingface.heads import (
    eval_mode,
    is_sharded,
    is_tensor_parallel,
    local_head,
)
from popsd_integrations.huggingface.packing import CONTEXT_OF, Packed, joined


class FrozenWeights(Protocol):
    """Where the frozen weights come from."""

    def weights(self) -> Any:
        """Context manager that yields the model with the frozen weights, in eval mode."""


class AdapterOff:
    """The model under its adapter: a PEFT model, or one with ``model.add_adapter``. No memory beyond the student's.

    Raises ValueError for a model without an adapter.
    """

    def __init__(self, model: Any) -> None:
        if not has_adapter(model):
            raise ValueError(
                f"model: expected a PEFT model; got {type(model).__name__}, which has no adapter to disable. "
                "Use FrozenCopy under full fine-tuning."
            )
        self._given, self.model = model, unwrapped(model)

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The student's own model with its adapter off, in eval mode. On leaving, flags and modes are as before."""
        check_seen(self._given)
        # On leaving, disable_adapter() sets requires_grad also on adapter parameters that the user had frozen.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]

        def restore() -> None:
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

        with eval_mode(self.model):
            try:
                with self._off():
                    # FSDP1 forgets what a unit has accumulated once nothing in it requires a gradient.
                    if any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules()):
                        restore()
                    yield self.model
            finally:
                restore()

    @contextmanager
    def _off(self) -> Iterator[None]:
        if hasattr(self.model, "disable_adapter"):
            with self.model.disable_adapter():
                yield
            return
        # After model.add_adapter. transformers' own enable_adapters() does not switch modules_to_save on again.
        layers = [x for x in self.model.modules() if isinstance(getattr(type(x), "disable_adapters", None), property)]
        active = [layer for layer in layers if not layer.disable_adapters]
        for layer in active:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in active:
                layer.enable_adapters(True)

    def constant(self) -> dict[str, nn.Parameter]:
        """The parameters that training must leave as they are."""
        return {name: p for name, p in self.model.named_parameters() if not p.requires_grad}


class FrozenModel:
    """Another model than the student, whose weights nobody trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        yield self.model

    def constant(self) -> dict[str, nn.Parameter]:
        """The parameters that training must leave as they are."""
        return dict(self.model.named_parameters())


class FrozenCopy(FrozenModel):
    """A copy of the weights as they are now, for full fine-tuning. It takes the memory of the weights once more.

    Raises ValueError for a model with an adapter, which `AdapterOff` serves without a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        if has_adapter(model):
            raise ValueError(
                f"model: expected a model without adapters; got {type(model).__name__}. AdapterOff needs no copy."
            )
        if is_tensor_parallel(model):  # transformers puts forwards on the modules that hold on to their weights
            raise ValueError(
                f"model: expected one that no tensor-parallel plan shares out, whose copy would compute with the trained "
                f"weights; got {type(model).__name__}. Load the initial weights once more and pass FrozenModel(them)."
            )
        super().__init__(copy.deepcopy(unwrapped(model)).requires_grad_(False))


class EMA(FrozenModel):
    """Exponential moving average of the trained weights: average ← decay·average + (1 - decay)·model, per ``update``.

    It starts as the weights are now. What is not trained is shared with the model, so under LoRA only the adapter has a
    copy. decay: in [0, 1]; 1 keeps the initial weights, 0 follows the model at once.
    The average is kept in float32: in bfloat16 a step of 1 - decay = 1e-3 would round away.
    Raises ValueError for another decay, and for sharded parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], such as 0.999; got {decay}.")
        self.decay = decay
        model = unwrapped(model)
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                "model: expected whole parameters; got sharded ones. An EMA works on one GPU and under DDP."
            )
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        super().__init__(copy.deepcopy(model, memo=shared))
        self._followers = {
            name: p.requires_grad_(False) for name, p in self.model.named_parameters() if name in self._live
        }
        self._average = {name: p.detach().float() for name, p in self._followers.items()}

    def constant(self) -> dict[str, nn.Parameter]:
        """What the average shares with the model, because it is not trained."""
        return {name: p for name, p in super().constant().items() if name not in self._followers}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step. Call it after the optimiser's step."""
        for name, average in self._average.items():
            average.lerp_(self._live[name].to(average), 1 - self.decay)
        self._write()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages, float32, by parameter name."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``state_dict``. Raises ValueError for the averages of another model."""
        if state.keys() != self._average.keys():
            different = sorted(state.keys() ^ self._average.keys())
            raise ValueError(
                f"state: expected averages of this model's trained parameters; they differ in {different}."
            )
        for name, average in self._average.items():
            average.copy_(state[name])
        self._write()

    def _write(self) -> None:
        for name, follower in self._followers.items():
            follower.copy_(self._average[name])  # in float32 they are the same tensor


def frozen_weights(model: nn.Module) -> AdapterOff | FrozenCopy:
    """The source that fits the model: `AdapterOff` under PEFT, otherwise `FrozenCopy`. Call it before training."""
    return AdapterOff(model) if has_adapter(model) else FrozenCopy(model)


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter: PEFT's wrapper, or one put on by ``model.add_adapter``."""
    inner = unwrapped(model)
    return hasattr(inner, "disable_adapter") or getattr(inner, "_hf_peft_config_loaded", False)


class FrozenChecksum:
    """What tells whether the frozen weights are still those of the start: the sum of each parameter's bits.

    source: `AdapterOff`, `FrozenCopy`, `FrozenModel` or `EMA`. Of the last, what it shares with the model is compared.
    The sums are integers, so they do not depend on the order of summation and the comparison is exact. It reads the weights
    once, which takes less time than a forward. Sharded parameters are summed over all processes, and each must take part.
    """

    def __init__(self, source: AdapterOff | FrozenModel) -> None:
        self.source = source
        self.values = self._sums()

    def check(self) -> None:
        """Raise RuntimeError where a frozen weight has changed since the start."""
        moved = [name for name, value in self._sums().items() if value != self.values[name]]
        if moved:
            raise RuntimeError(
                f"frozen weights: expected those of the start; {len(moved)} of {len(self.values)} parameters have "
                f"changed, such as {moved[0]}. Base, teacher and reference are no longer the initial model's. Something "
                "writes to them: merging an adapter into 16-bit weights and out again does (vLLM's weight sync). Load the "
                "model in float32, generate without vLLM, or keep the weights apart as teacher_model or FrozenCopy."
            )

    @torch.no_grad()
    def _sums(self) -> dict[str, int]:
        constant: dict[str, torch.Tensor] = {**self.source.constant(), **_scales(self.source.model)}
        sums = [_shard(p).view(_BITS[p.dtype.itemsize]).sum(dtype=torch.int64) for p in constant.values()]
        if not sums:
            return {}
        total = torch.stack([x.to(sums[0].device) for x in sums])
        if any(map(is_sharded, constant.values())) and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return dict(zip(constant, total.tolist(), strict=True))


def _scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a quantised model's state holds beside parameters and buffers: the scales of its packed weights, without which
    the same bits are other weights."""
    if not getattr(model, "is_quantized", False):  # by transformers; packed bits may be stored in a floating dtype
        return {}
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    state = model.state_dict().items()
    return {name: x for name, x in state if name not in known and isinstance(x, torch.Tensor)}


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _shard(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: all of it, or FSDP2's or ZeRO-3's part."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    shard: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard.detach()


class FrozenStates(NamedTuple):
    """Hidden states [B, T, D] that predict the completion tokens, None for contexts that were not run; and their head.

    A head that FSDP2 shards is as this rank holds it: pass it through ``gathered`` before the loss takes it.
    """

    base: torch.Tensor | None
    teacher: torch.Tensor
    reference: torch.Tensor | None
    head: Head


@torch.no_grad()
def frozen_states(
    source: FrozenWeights,
    packed: Mapping[str, Packed],
    contexts: Sequence[str] | None = None,
    *,
    batched: bool = False,
    batch_size: int | None = None,
) -> FrozenStates:
    """Run the frozen weights over the same completions in each context, without gradient, in eval mode.

    packed: the batches of "base", "teacher" and "reference" on the model's device, from `pack_contexts`, or from
        `pack_padded` for tensors. All must hold the same completions; `check_same_completions` compares batches packed
        by hand.
    contexts: which of them to run, None for all of ``packed``. The teacher is always needed, and standard OPSD needs no
        other.
    batched: run all contexts as one batch of len(contexts)·B rows. Contexts differ in length, so padding usually makes it
        slower (prompts of 64/320/256 tokens, 128 new: 0.97 s against 0.79 s one by one). It pays where they are alike.
    batch_size: rows per forward, None for all.

    Raises ValueError where the teacher is missing, a context is not in ``packed``, the batches differ in B or T, or
    batch_size is below 1.

    >>> prompts = [Prompts(question=[1, 2], teacher=[1, 2, 3], reference=[3])]
    >>> packed = pack_contexts(prompts, [[7, 8]], pad_token_id=0)
    >>> states = frozen_states(frozen_weights(model), packed, ["base", "teacher"])
    >>> list(states.base.shape), states.reference is None
    ([1, 2, 16], True)
    """
    names = list(packed if contexts is None else contexts)
    if "teacher" not in names or not set(names) <= CONTEXT_OF.keys() & packed.keys():
        known = [name for name in CONTEXT_OF if name in packed]
        raise ValueError(f"contexts: expected the teacher and others of {known}, which are packed; got {names}.")
    sizes = {name: (len(packed[name].spans), packed[name].longest) for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"packed: expected the same completions in every context; got (rows, longest completion) {sizes}. Pack all "
            "contexts over the same token ids, as pack_contexts does."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, or None; got {batch_size}.")
    with source.weights() as model:
        if batched:
            states = _states(model, joined([packed[name] for name in names]), batch_size).chunk(len(names))
        else:
            states = tuple(_states(model, packed[name], batch_size) for name in names)
        head = local_head(model)  # after the forwards: under ZeRO-3 they empty a head tied to the embeddings
    found = dict(zip(names, states, strict=True))
    return FrozenStates(found.get("base"), found["teacher"], found.get("reference"), head)


def _states(model: nn.Module, packed: Packed, batch_size: int | None) -> torch.Tensor:
    size = batch_size or len(packed.spans)
    parts = [
        completion_states(model, packed.rows(slice(first, first + size))) for first in range(0, len(packed.spans), size)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
