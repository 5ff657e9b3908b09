"""What the purified target does to a token: how hard the soft clip works, and how far the target leaves base and teacher."""

from __future__ import annotations

import math

import torch

from popsd.types import Purification

QUANTILES = (0.5, 0.9, 0.99)


def purification_rows(
    delta: torch.Tensor, base: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, pmi_clip: float | None
) -> Purification:
    """[C] results from Δ̄ and the tempered float32 logits of base, teacher and finished target, [C, V] each."""
    size = delta.abs()
    vocab = size.shape[1]
    saturation = torch.zeros_like(size[:, 0]) if pmi_clip is None else (size > pmi_clip).float().mean(dim=1)
    median, q90, q99 = (size.kthvalue(math.ceil(share * vocab), dim=1).values for share in QUANTILES)
    log_base, log_teacher, log_target = (torch.log_softmax(z, dim=1) for z in (base, teacher, target))
    q = log_target.exp()
    dot = torch.linalg.vecdot
    return Purification(
        saturation,
        median,
        q90,
        q99,
        size.amax(dim=1),
        dot(q, log_target - log_teacher),
        dot(q, log_target - log_base),
        0.5 * (q - log_base.exp()).abs().sum(dim=1),
        (target.argmax(dim=1) != base.argmax(dim=1)).float(),
    )
