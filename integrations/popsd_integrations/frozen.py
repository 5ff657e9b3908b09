"""The frozen initial weights, and the three forwards over them that make the target.

A source of frozen weights is a small class whose ``weights()`` is a context manager that yields the model to run. Its
head is fetched inside that context, since an adapter that trains the head (``modules_to_save``) has another one
outside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from popsd import Head
from popsd_integrations.contexts import Packed, Prompts, check_same_completions, pack
from popsd_integrations.heads import head_from_model, hidden_states

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


class FrozenCopy:
    """A copy of the weights as they are now, for full fine-tuning: as much memory again as the model's weights."""

    def __init__(self, model: nn.Module) -> None:
        if hasattr(model, "disable_adapter"):
            raise ValueError(
                f"model: expected a model without adapters; got {type(model).__name__}. AdapterOff needs no copy."
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        yield self.model


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
) -> FrozenStates:
    """Run the frozen weights over the same completions in each context, without gradient, in eval mode.

    prompts, completions: one per row. contexts: which of base, teacher, reference to run; standard OPSD needs the
        teacher alone.
    student: the student's packed batch, whose completion ids must then agree with every context's (ValueError).
    batched: all contexts as one batch of len(contexts)·B rows. Contexts differ in length, so padding usually makes it
        slower (prompts of 64/320/256 tokens, 128 new: 0.97 s against 0.79 s apart); it pays where they are alike.
    """
    if "teacher" not in contexts or not set(contexts) <= set(CONTEXT_OF):
        raise ValueError(f"contexts: expected the teacher and others of {list(CONTEXT_OF)}; got {list(contexts)}.")
    with source.weights() as model:
        head = head_from_model(model)
        device = head.weight.device
        packs = {
            name: pack(
                [getattr(row, CONTEXT_OF[name]) for row in prompts],
                completions,
                pad_token_id=pad_token_id,
                device=device,
            )
            for name in contexts
        }
        check_same_completions(**({} if student is None else {"student": student}), **packs)
        if batched:
            rows = [getattr(row, CONTEXT_OF[name]) for name in contexts for row in prompts]
            together = pack(rows, list(completions) * len(contexts), pad_token_id=pad_token_id, device=device)
            predicting = together.predicting(_forward(model, together))
            states = dict(zip(contexts, predicting.chunk(len(contexts)), strict=True))
        else:
            states = {name: packed.predicting(_forward(model, packed)) for name, packed in packs.items()}
    return FrozenStates(states.get("base"), states["teacher"], states.get("reference"), head)


def _forward(model: nn.Module, packed: Packed) -> torch.Tensor:
    return hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
