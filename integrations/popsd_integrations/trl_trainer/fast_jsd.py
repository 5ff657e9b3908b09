"""TRL's own two-distribution loss by ``popsd.linear_jsd``, for users of its ``DistillationTrainer``."""

from __future__ import annotations

from typing import Any

import torch

from popsd import DivergenceConfig, Head, linear_jsd


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
    """TRL's ``_chunked_divergence_loss`` by ``popsd.linear_jsd``: the same arguments, the same three results.

    It makes the loss of a stock ``DistillationTrainer`` faster; see examples/fast_jsd_for_trl.py.

    student_hidden_states, teacher_hidden_states: [B, T, D]. The weights: [V, D]. completion_mask: [B, T]. chunk_size: TRL
        1.12 passes it, and it is not used. options: TRL's keywords for biases, logit scales, soft caps and temperature.
    Returns the loss, the summed student entropy and the number of valid positions, each 0-dim.
    """
    heads = [
        Head(
            weight.full_tensor() if hasattr(weight, "full_tensor") else weight,
            options.get(f"{name}_lm_head_bias"),
            logit_scale=options.get(f"{name}_logit_scale", 1.0),
            softcap=options.get(f"{name}_final_logit_softcapping"),
        )
        for name, weight in (("student", student_lm_head_weight), ("teacher", teacher_lm_head_weight))
    ]
    valid = completion_mask.reshape(-1).nonzero()[:, 0]
    output = linear_jsd(
        student_hidden_states.flatten(0, -2)[valid],
        heads[0],
        teacher_hidden_states.flatten(0, -2)[valid],
        heads[1],
        config=DivergenceConfig(beta=beta, temperature=options.get("temperature", 1.0)),
        reduction="sum",
    )
    count = torch.tensor(len(valid), device=output.loss.device)
    items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return output.loss / items, output.student_entropy.sum(), count
