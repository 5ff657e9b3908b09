"""What a row sweep computes: the numbers and switches shared by every kernel and by their torch bodies.

Nothing here imports Triton, so a machine without it can still describe a sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

LOGIT_FLOOR = -1.0e30
"""Stand-in for a logit of -inf: its probability is exactly 0 in float32, and no inf - inf can arise."""


@dataclass(frozen=True)
class LogitTransform:
    """How a raw projection becomes a logit, as the model has it: ``softcap * tanh(scale * (raw + bias) / softcap)``.

    The bias is a tensor and travels beside this; ``softcap=None`` leaves the tanh out.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class RowOptions:
    """One sweep's mathematics. Notation and equation numbers: arXiv 2607.02234.

    beta: generalised JSD coefficient; 0 is KL(target‖student), 1 is KL(student‖target) (arXiv 2306.13649).
    inv_temperature: multiplies every stream's transformed logits.
    pmi_beta: the paper's β of Eq. 16.
    pmi_clip: the paper's c of Eq. 15; ``None`` leaves the tanh out.
    entry_clip: upper bound on each vocabulary entry's contribution; a capped entry has zero derivative.
    token_clip: upper bound on the token's loss; a capped token has zero gradient.
    student, target: logit transforms of the student and of the base (or, with two distributions, target) stream.
    delta_scale: multiplies the difference of raw teacher and reference projections, before the temperature.
    relative: the base (or target) stream, in a decomposition the reference, holds its difference to the student, without
        bias or soft cap: the log-ratio is then rounded relative to itself, not to the logits. Differences are finite.
    """

    beta: float = 0.5
    inv_temperature: float = 1.0
    pmi_beta: float = 1.0
    pmi_clip: float | None = 10.0
    entry_clip: float | None = None
    token_clip: float | None = None
    student: LogitTransform = LogitTransform()
    target: LogitTransform = LogitTransform()
    delta_scale: float = 1.0
    relative: bool = False


class RowStatistics(NamedTuple):
    """Normalisers of a row, each [C] float32, natural log; kept apart because their difference is what gets small.

    log p(v) = (s(v) - student_max) - student_logsum, with logsum = log Σ exp(s - max); likewise the target.
    """

    student_max: torch.Tensor
    student_logsum: torch.Tensor
    target_max: torch.Tensor
    target_logsum: torch.Tensor


class RowLoss(NamedTuple):
    """Per-token results of the second sweep, each [C] float32, in nats.

    divergence: Eq. 18 after both clips. student_kl, target_kl: KL of student and of target to the mixture m
    (beta = 0: KL(target‖student) in ``target_kl``; beta = 1: KL(student‖target) in ``student_kl``; the other one is 0).
    clip_fraction: share of vocabulary entries capped by entry_clip. token_clipped: 1 where token_clip capped.
    argmax_agreement: 1 where student and target have their largest logit at a common entry.
    token_logprob: log p of the sampled token, NaN where no token ids were given.
    """

    divergence: torch.Tensor
    student_kl: torch.Tensor
    target_kl: torch.Tensor
    student_entropy: torch.Tensor
    target_entropy: torch.Tensor
    clip_fraction: torch.Tensor
    token_clipped: torch.Tensor
    argmax_agreement: torch.Tensor
    token_logprob: torch.Tensor
