"""Decomposition of the teacher's signal, Eq. 4: how much of it exists without the question."""

from __future__ import annotations

import torch

from popsd.types import Decomposition


def decompose_rows(student: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor) -> Decomposition:
    """Norms and cosines of Δ_total, Δ_ref and Δ_it from tempered float32 logits [C, V] each; [C] results.

    The differences are formed from log-probabilities, not expanded into moments: sums of squares of raw differences lose
    their digits where a common offset dominates.
    """
    log_student, log_teacher, log_reference = (torch.log_softmax(x, dim=1) for x in (student, teacher, reference))
    total, transferable = log_teacher - log_student, log_teacher.sub_(log_reference)
    induced = log_reference.sub_(log_student)
    dot = torch.linalg.vecdot
    total_norm, induced_norm, transferable_norm = (dot(x, x).sqrt() for x in (total, induced, transferable))
    return Decomposition(
        total_norm,
        induced_norm,
        transferable_norm,
        _ratio(dot(total, induced), total_norm * induced_norm),
        _ratio(dot(total, transferable), total_norm * transferable_norm),
        _ratio(induced_norm, total_norm),
    )


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
