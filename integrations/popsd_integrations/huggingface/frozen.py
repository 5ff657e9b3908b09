"""The frozen initial weights, and the three forwards over them that make the target.

A source of frozen weights is a small class whose ``weights()`` is a context manager that yields the model to run. Its
head is fetched inside that context, since an adapter that trains the head (``modules_to_save``) has another one
outside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from popsd import Head
from popsd_integrations.huggingface.heads import causal_model, head_from_model, hidden_states, is_sharded
from popsd_integrations.huggingface.packing import Packed, check_same_completions, pack
from popsd_integrations.huggingface.prompts import Prompts

CONTEXT_OF = {"base": "question", "teacher": "teacher", "reference": "reference"}


class FrozenWeights(Protocol):
    """Where the frozen weights come from."""

    def weights(self) -> Any:
        """Context manager that yields the model carrying the frozen weights, in eval mode."""


class AdapterOff:
    """The model under its PEFT adapter: no memory beyond the student's."""

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"model: expected a PEFT model; got {type(model).__name__}, which has no adapter to disable. "
                "Use FrozenCopy under full fine-tuning."
            )
        self.model = model

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The student's own model, adapter off, eval mode; flags and modes as found come back on leaving."""
        # disable_adapter() switches requires_grad on again on leaving, on adapter parameters the user had frozen too.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with eval_mode(self.model):
            try:
                with self.model.disable_adapter():
                    yield self.model
            finally:
                for parameter, requires_grad in flags:
                    parameter.requires_grad_(requires_grad)


class FrozenModel:
    """A model of its own whose weights nobody trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        yield self.model


class FrozenCopy(FrozenModel):
    """A copy of the weights as they are now, for full fine-tuning: as much memory again as the model's weights."""

    def __init__(self, model: nn.Module) -> None:
        if hasattr(model, "disable_adapter"):
            raise ValueError(
                f"model: expected a model without adapters; got {type(model).__name__}. AdapterOff needs no copy."
            )
        super().__init__(copy.deepcopy(model).requires_grad_(False))


class EMA(FrozenModel):
    """Exponential moving average of the trained weights: average ← decay·average + (1 − decay)·model, per ``update``.

    Starts as the weights are now. What is not trained is shared with the model, so under LoRA only the adapter has a
    copy. decay: in [0, 1]; 1 keeps the initial weights, 0 follows the model at once.
    The average is kept in float32: in bfloat16 a step of 1 − decay = 1e-3 would round away.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], such as 0.999; got {decay}.")
        self.decay = decay
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

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step; call it after the optimiser's."""
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
            follower.copy_(self._average[name])  # to itself where the model is float32


def frozen_weights(model: nn.Module) -> AdapterOff | FrozenCopy:
    """The source that fits: the adapter off under PEFT, else a copy of the weights as they are now (call it before
    training).
    """
    return AdapterOff(model) if hasattr(model, "disable_adapter") else FrozenCopy(model)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; on leaving every module returns to its own mode, not to one mode for all."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


class FrozenStates(NamedTuple):
    """Hidden states [B, T, D] that predict the completion tokens, None for contexts not asked for; their head."""

    base: torch.Tensor | None
    teacher: torch.Tensor
    reference: torch.Tensor | None
    head: Head


@torch.no_grad()
def frozen_states(
    source: FrozenWeights,
    prompts: Sequence[Prompts],
    completions: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    contexts: Sequence[str] = ("base", "teacher", "reference"),
    student: Packed | None = None,
    batched: bool = False,
    batch_size: int | None = None,
) -> FrozenStates:
    """Run the frozen weights over the same completions in each context, without gradient, in eval mode.

    prompts, completions: one per row. contexts: which of base, teacher, reference to run; standard OPSD needs the
        teacher alone.
    student: the student's packed batch, whose completion ids must then agree with every context's (ValueError).
    batched: all contexts as one batch of len(contexts)·B rows. Contexts differ in length, so padding usually makes it
        slower (prompts of 64/320/256 tokens, 128 new: 0.97 s against 0.79 s apart); it pays where they are alike.
    batch_size: rows per forward, None for all.
    """
    if "teacher" not in contexts or not set(contexts) <= set(CONTEXT_OF):
        raise ValueError(f"contexts: expected the teacher and others of {list(CONTEXT_OF)}; got {list(contexts)}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, or None; got {batch_size}.")
    with source.weights() as model:
        device = causal_model(model).device

        def run(names: Sequence[str]) -> torch.Tensor:
            rows = [getattr(row, CONTEXT_OF[name]) for name in names for row in prompts]
            ids = list(completions) * len(names)
            size = batch_size or len(rows)
            parts = []
            for first in range(0, len(rows), size):
                part = slice(first, first + size)
                packed = pack(rows[part], ids[part], pad_token_id=pad_token_id, device=device)
                packed = packed._replace(longest=max(map(len, completions)))
                states = hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
                parts.append(packed.predicting(states))
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        if student is not None:  # every context is packed over these very completions
            question = pack([row.question for row in prompts], completions, pad_token_id=pad_token_id)
            check_same_completions(**{"student": student, contexts[0]: question})
        if batched:
            states = dict(zip(contexts, run(contexts).chunk(len(contexts)), strict=True))
        else:
            states = {name: run([name]) for name in contexts}
        head = head_from_model(model)  # after the forwards: under ZeRO-3 they empty a head tied to the embeddings
    return FrozenStates(states.get("base"), states["teacher"], states.get("reference"), head)
