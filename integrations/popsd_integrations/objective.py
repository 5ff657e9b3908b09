"""The loss of one micro-batch from a model and frozen hidden states: what the plain loop and the TRL trainer share."""

from __future__ import annotations

import torch
from torch import nn

from popsd import HiddenStates, PurifiedOPSDLoss
from popsd_integrations.contexts import Packed
from popsd_integrations.frozen import FrozenStates
from popsd_integrations.heads import gathered, head_from_model, hidden_states, same_head


def needed_contexts(loss_target: str, decompose: bool) -> list[str]:
    """The frozen contexts that a target is built of, and the reference where Eq. 4 is to be measured."""
    if loss_target == "purified":
        return ["base", "teacher", "reference"]
    return ["teacher", "reference"] if decompose else ["teacher"]


def student_loss(
    model: nn.Module,
    loss_fn: PurifiedOPSDLoss,
    packed: Packed,
    frozen: FrozenStates,
    *,
    mask: torch.Tensor | None = None,
    num_items: float | torch.Tensor | None = None,
    decompose: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward of the student with gradient, then the loss: results and errors of ``popsd.PurifiedOPSDLoss``.

    packed: questions and completions. frozen: states of the same completions. mask: [B, T], None for all tokens.
    Where student and frozen weights have the same untrained head, one head serves all four streams, which saves a
    matrix product.
    """
    states = hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
    head = head_from_model(model)
    frozen_head = None
    if head.weight.requires_grad or not same_head(head, frozen.head):
        with torch.no_grad():
            frozen_head = gathered(frozen.head, states.dtype)
    return loss_fn(
        HiddenStates(packed.predicting(states), frozen.base, frozen.teacher, frozen.reference),
        student_head=gathered(head, states.dtype),
        frozen_head=frozen_head,
        mask=packed.completion_mask if mask is None else mask,
        num_items=num_items,
        token_ids=packed.completion_ids,
        decompose=decompose,
    )
