"""What a run trains towards, and its loss on one micro-batch. The plain loop and the TRL trainer share both.

| loss_target | target | frozen forwards | defaults |
|---|---|---|---|
| purified | arXiv 2607.02234, Eq. 12-17 | base, teacher, reference | ``PurifiedConfig()`` |
| opsd | the teacher itself | teacher | ``PurifiedConfig()``; OPSD's own are ``popsd.presets.opsd`` |
| beta_opsd | ∝ π_0^(1−1/β)·π_T^(1/β), arXiv 2607.28582 | base, teacher | ``popsd.presets.beta_opsd`` |
| contrastive_hints | ∝ π_0·(π_right/π_wrong)^(1/β) | base, right hint, wrong hint | ``popsd.presets.contrastive_hints`` |

β is ``pmi_beta``. Every geometric mix of base and teacher is beta_opsd at some β.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from popsd import HiddenStates, MaskConfig, PurifiedConfig, PurifiedOPSDLoss, presets
from popsd_integrations.huggingface.frozen import FrozenStates
from popsd_integrations.huggingface.heads import gathered, hidden_states, local_head, same_head
from popsd_integrations.huggingface.packing import Packed

LossTarget = Literal["purified", "opsd", "beta_opsd", "contrastive_hints"]

_PRESETS: dict[str, Callable[..., PurifiedConfig]] = {
    "beta_opsd": lambda pmi_beta=1.0, **changes: presets.beta_opsd(pmi_beta, **changes),
    "contrastive_hints": lambda pmi_beta=1.0, **changes: presets.contrastive_hints(pmi_beta, **changes),
}


def target_config(loss_target: LossTarget, **changes: Any) -> PurifiedConfig:
    """The configuration of a target: its own defaults, changed by ``changes``, fields of `popsd.PurifiedConfig`.

    Raises ValueError for an unknown target, and what `popsd.PurifiedConfig` raises.
    """
    if loss_target not in get_args(LossTarget):
        raise ValueError(f"loss_target: expected one of {list(get_args(LossTarget))}; got {loss_target!r}.")
    return _PRESETS.get(loss_target, PurifiedConfig)(**changes)


def loss_function(
    loss_target: LossTarget,
    config: PurifiedConfig | None = None,
    *,
    masks: MaskConfig | None = None,
    **options: Any,
) -> PurifiedOPSDLoss:
    """The loss towards a target. config: None is `target_config`'s. options: of `popsd.PurifiedOPSDLoss`.

    Raises ValueError for masks that read Eq. 4 where no reference-only teacher is run.
    """
    config = config or target_config(loss_target)
    if masks is not None and masks.reads_decomposition and loss_target in ("opsd", "beta_opsd"):
        raise ValueError(
            "masks: max_reference_fraction and min_cos_transferable need the reference-only teacher; got "
            f"loss_target={loss_target!r}, which runs none. Use the entropy rules, or another target."
        )
    form: Any = "opsd" if loss_target == "opsd" else "purified"
    return PurifiedOPSDLoss(config, loss_target=form, masks=masks, **options)


def needed_contexts(loss_target: LossTarget, decompose: bool) -> list[str]:
    """The frozen contexts that a target is built of. OPSD needs the reference only to measure Eq. 4 (``decompose``)."""
    if loss_target == "opsd":
        return ["teacher", "reference"] if decompose else ["teacher"]
    return ["base", "teacher"] if loss_target == "beta_opsd" else ["base", "teacher", "reference"]


def measures_decomposition(loss_target: LossTarget) -> bool:
    """Whether Eq. 4 can be logged. Not for β-OPSD, which has the base in the place of the reference."""
    return loss_target != "beta_opsd"


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

    packed: questions and completions, as the base has them. frozen: states of the same completions. Where the reference
        was not run, the base takes its place, which makes the purified target β-OPSD's. mask: [B, T] bool or float
        weights, None for all tokens.
    Where student and frozen weights have the same untrained head, one head serves all four streams, which saves a
    matmul.
    """
    states = hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
    head = local_head(model)
    frozen_head = None
    if head.weight.requires_grad or not same_head(head, frozen.head):
        with torch.no_grad():
            frozen_head = gathered(frozen.head, states.dtype)
    reference = frozen.base if frozen.reference is None else frozen.reference
    return loss_fn(
        HiddenStates(packed.predicting(states), frozen.base, frozen.teacher, reference),
        student_head=gathered(head, states.dtype),
        frozen_head=frozen_head,
        mask=packed.completion_mask if mask is None else mask,
        num_items=num_items,
        token_ids=packed.completion_ids,
        decompose=decompose,
    )
