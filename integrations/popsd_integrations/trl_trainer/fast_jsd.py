"""TRL's two-distribution losses by ``popsd.linear_jsd``: what ``popsd_integrations.patch_trl`` puts in their place.

``DistillationTrainer`` calls one function on hidden states, and that is replaced. ``GKDTrainer`` takes the logits of whole
sequences, so its ``compute_loss`` is replaced.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
import trl.trainer.distillation_trainer as distillation
from torch import nn

from popsd import DivergenceConfig, Head, LossOutput, linear_jsd
from popsd_integrations.huggingface.distributed import run_in_forward
from popsd_integrations.huggingface.heads import gathered, head_from_model, hidden_states
from popsd_integrations.huggingface.invariants import check_head

_undo: list[tuple[Any, str, Any]] = []
"""Where the patch stands: owner, name, and what was there, which may be nothing."""


def patch() -> None:
    """See ``popsd_integrations.patch_trl``. Importing this module's package has checked TRL's version."""
    if _undo:
        return
    from trl.experimental.gkd import GKDTrainer

    _replace(distillation, "_chunked_divergence_loss", chunked_divergence_loss)
    _replace(distillation.DistillationTrainer, "__init__", _checking(distillation.DistillationTrainer, _check_options))
    _replace(GKDTrainer, "__init__", _checking(GKDTrainer, _check_gkd))
    _replace(GKDTrainer, "compute_loss", _gkd_loss)
    _replace(GKDTrainer, "prediction_step", _loss_only(GKDTrainer))


def unpatch() -> None:
    while _undo:
        owner, name, before = _undo.pop()
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _replace(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, vars(owner).get(name)))  # an inherited one is uncovered again
    setattr(owner, name, value)


def chunked_divergence_loss(
    student_hidden_states: torch.Tensor,
    teacher_hidden_states: torch.Tensor,
    student_lm_head_weight: torch.Tensor,
    teacher_lm_head_weight: torch.Tensor,
    completion_mask: torch.Tensor,
    beta: float,
    *chunk_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """TRL's ``_chunked_divergence_loss``: the same arguments, the same three results.

    student_hidden_states, teacher_hidden_states: [B, T, D]. The weights: [V, D]. completion_mask: [B, T]. chunk_size: TRL
        1.12 to 1.14 pass it, and it is not used. options: TRL's keywords for biases, logit scales, soft caps and temperature.
    Returns the loss, the summed student entropy and the number of valid positions, each 0-dim.
    """
    heads = [
        Head(
            weight,
            options.get(f"{name}_lm_head_bias"),
            logit_scale=options.get(f"{name}_logit_scale", 1.0),
            softcap=options.get(f"{name}_final_logit_softcapping"),
        )
        for name, weight in (("student", student_lm_head_weight), ("teacher", teacher_lm_head_weight))
    ]
    loss, output, count = _divergence(
        (student_hidden_states, gathered(heads[0], student_hidden_states.dtype)),
        (teacher_hidden_states, gathered(heads[1], teacher_hidden_states.dtype)),
        completion_mask != 0,
        DivergenceConfig(beta=beta, temperature=options.get("temperature", 1.0)),
        num_items_in_batch,
    )
    return loss, output.student_entropy.sum(), count


def _divergence(
    student: tuple[torch.Tensor, Head],
    teacher: tuple[torch.Tensor, Head],
    valid: torch.Tensor,
    config: DivergenceConfig,
    items: torch.Tensor | int | None,
) -> tuple[torch.Tensor, LossOutput, torch.Tensor]:
    """Over the positions of ``valid`` [B, T]: the sum of their losses by ``items``, or by their number; and that number."""
    index = valid.flatten().nonzero()[:, 0]
    (hidden, head), (target, target_head) = ((x.flatten(0, 1)[index], own) for x, own in (student, teacher))
    output = linear_jsd(hidden, head, target, target_head, config=config, reduction="sum")
    count = torch.tensor(len(index), device=output.loss.device)
    if items is None:
        items = count.clamp(min=1)
    return output.loss / (items.to(output.loss.device) if isinstance(items, torch.Tensor) else items), output, count


def _gkd_loss(
    self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """``GKDTrainer.compute_loss``. Its temperature is that of sampling alone; the loss compares at temperature 1."""
    ids, attention, valid = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:] != -100
    teacher = self.accelerator.unwrap_model(self.teacher_model).eval()
    student = self.accelerator.unwrap_model(model)

    def loss() -> torch.Tensor:
        with self.accelerator.autocast():
            with torch.no_grad():
                target = _states(teacher, ids, attention)
            own = _states(student, ids, attention)
            return _divergence(own, target, valid, DivergenceConfig(beta=self.beta), num_items_in_batch)[0]

    found = run_in_forward(model, loss)
    return (found, {}) if return_outputs else found  # transformers reads outputs where it wants predictions


def _states(model: nn.Module, ids: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, Head]:
    """What predicts each token but the first, and the head."""
    return hidden_states(model, ids, attention)[:, :-1], head_from_model(model)


def _loss_only(trainer: Any) -> Any:
    theirs = trainer.prediction_step

    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *rest: Any, **named: Any
    ) -> Any:
        if not prediction_loss_only:
            raise ValueError(
                "prediction_loss_only: expected True after patch_trl, whose loss makes no logits to predict with; got False. "
                "Call popsd_integrations.unpatch_trl() first."
            )
        return theirs(self, model, inputs, prediction_loss_only, *rest, **named)

    return prediction_step


def _checking(trainer: Any, check: Any) -> Any:
    theirs = trainer.__init__

    @functools.wraps(theirs)
    def __init__(self: Any, *given: Any, **named: Any) -> None:
        theirs(self, *given, **named)
        check(self)

    return __init__


def _check_options(self: Any, *further: str) -> None:
    """Raise ValueError for an option that no loss here reads, where it is not at its default."""
    defaults = {option.name: option.default for option in fields(self.args)}
    for name in ("label_smoothing_factor", *further):
        value = getattr(self.args, name, None)
        if value not in (defaults.get(name), None, 0):
            raise _refused(name, value, "which neither TRL's loss nor popsd's reads")


def _check_gkd(self: Any) -> None:
    from trl.experimental.gkd import GKDTrainer

    _check_options(self, "router_aux_loss_coef")
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(self, name) is not None:
            raise _refused(name, getattr(self, name), "but the loss makes no logits")
    if self.args.loss_type == "dft":
        raise _refused("loss_type", "dft", "but the loss is the divergence alone")
    if getattr(self, "use_liger_gkd_loss", False):
        raise _refused("use_liger_kernel", True, "whose JSD this one takes the place of")
    if type(self).generalized_jsd_loss is not GKDTrainer.generalized_jsd_loss:
        raise _refused("generalized_jsd_loss", f"one of {type(self).__name__}", "which would not be called")
    for name in ("fsdp", "deepspeed"):
        if getattr(self, f"is_{name}_enabled"):
            raise _refused(name, True, "with which this loss was not tried; trl.DistillationTrainer takes it")
    for model in (self.model, self.accelerator.unwrap_model(self.teacher_model)):
        check_head(model)


def _refused(name: str, got: Any, why: str) -> ValueError:
    return ValueError(
        f"{name}: expected none after patch_trl; got {got!r}, {why}. Leave it out, or call "
        "popsd_integrations.unpatch_trl() first."
    )
