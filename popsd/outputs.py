"""What goes into a loss and comes out of it: hidden states, per-token results, decomposition, purification."""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from popsd_kernels.rows import RowLoss


class HiddenStates(NamedTuple):
    """Last hidden states at the same completion positions, each [N, D] or [B, T, D]; the student may have its own D.

    student: trainable weights on the question. base: frozen weights on the question. teacher: frozen weights on question
    plus reference solution. reference: frozen weights on the reference solution alone. The last three never receive gradient.
    ``base`` and ``reference`` may be None where only the teacher is the target (standard OPSD).
    """

    student: torch.Tensor
    base: torch.Tensor | None
    teacher: torch.Tensor
    reference: torch.Tensor | None


class SparseTarget(NamedTuple):
    """A target known at k entries of the vocabulary for each token, as teacher servers send it.

    ids: [N, k] or [B, T, k] int64, -1 in an empty place. log_probs: of the same shape, floating, the teacher's natural
    log-probabilities over its whole vocabulary, so that what is listed adds up to less than 1; -inf in an empty place. An id
    that stands twice in a row counts once, at its first place: the sampled token may be put behind the likeliest ones.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor


class Decomposition(NamedTuple):
    """Eq. 4 per token over the full vocabulary, each [N] float32: Δ_total = Δ_ref + Δ_it.

    total_norm = ‖log π_T − log π_θ‖, reference_norm = ‖log π_ref − log π_θ‖, transferable_norm = ‖log π_T − log π_ref‖,
    the two cosines of Δ_total with the parts, and reference_fraction = reference_norm / total_norm. A ratio with a zero
    denominator is 0. The first six are the paper's. The same six follow twice more:

    centred_*: every Δ less its mean over the vocabulary, so that no normaliser enters. weighted_*: each entry weighted by
    π_θ, so that a norm is the root mean square of the log-ratio under the student; in the raw fields a token that is never
    used counts as much as any other.

    ``method="gram"`` knows the centred fields alone (the raw ones too where the log-normalisers are given); the others are
    None.
    """

    total_norm: torch.Tensor | None
    reference_norm: torch.Tensor | None
    transferable_norm: torch.Tensor | None
    cos_total_reference: torch.Tensor | None
    cos_total_transferable: torch.Tensor | None
    reference_fraction: torch.Tensor | None
    centred_total_norm: torch.Tensor | None = None
    centred_reference_norm: torch.Tensor | None = None
    centred_transferable_norm: torch.Tensor | None = None
    centred_cos_total_reference: torch.Tensor | None = None
    centred_cos_total_transferable: torch.Tensor | None = None
    centred_reference_fraction: torch.Tensor | None = None
    weighted_total_norm: torch.Tensor | None = None
    weighted_reference_norm: torch.Tensor | None = None
    weighted_transferable_norm: torch.Tensor | None = None
    weighted_cos_total_reference: torch.Tensor | None = None
    weighted_cos_total_transferable: torch.Tensor | None = None
    weighted_reference_fraction: torch.Tensor | None = None


FAMILY = 6
"""Fields of a family of `Decomposition`: raw, centred, weighted."""
GRAM_FIELDS = Decomposition._fields[FAMILY : 2 * FAMILY]
"""What ``method="gram"`` knows without being told a normaliser."""


class Purification(NamedTuple):
    """What the purified target does to each token, each [N] float32; on request (``telemetry=True``).

    saturation: share of the vocabulary with |Δ̄| above c, where the tanh of Eq. 15 has lost most of its slope; 0 without
    one. delta_median, delta_q90, delta_q99, delta_max: of |Δ̄| in nats over the vocabulary, each the smallest value that
    the share does not exceed. target_teacher_kl, target_base_kl: KL(target‖teacher), KL(target‖base) in nats.
    mass_moved: total variation ½·Σ|target − base|. argmax_changed: 1 where target and base differ in their likeliest entry.
    """

    saturation: torch.Tensor
    delta_median: torch.Tensor
    delta_q90: torch.Tensor
    delta_q99: torch.Tensor
    delta_max: torch.Tensor
    target_teacher_kl: torch.Tensor
    target_base_kl: torch.Tensor
    mass_moved: torch.Tensor
    argmax_changed: torch.Tensor


_LOSS_OUTPUT = """What every loss of popsd returns. Shapes are those of the tokens given ([N] or [B, T]), float32.

loss: differentiable, weights applied; a scalar where ``reduction="sum"``. Everything else is detached:
divergence: the same before weights. student_kl, target_kl: KL of student and of target to the mixture, in nats
(with beta 0 or 1 the mixture is one of the two and its own KL is 0). student_entropy, target_entropy: nats.
clip_fraction: share of vocabulary entries capped by ``entry_clip``. token_clipped: 1 where ``token_clip`` capped.
argmax_agreement: 1 where student and target agree on the likeliest entry.
token_logprob, target_logprob: log π_θ and log target of ``token_ids``, None without them, NaN of an id of -1, and -1e30 or so
of a token that is impossible. decomposition, purification: None unless asked for.
weights: the weights actually used, masks included.
"""


if TYPE_CHECKING:

    class LossOutput(RowLoss):
        loss: torch.Tensor
        token_logprob: torch.Tensor | None  # type: ignore[assignment]
        decomposition: Decomposition | None
        weights: torch.Tensor
        purification: Purification | None
        target_logprob: torch.Tensor | None

        def __new__(cls, **fields: Any) -> LossOutput: ...
        def _replace(self, **fields: Any) -> LossOutput: ...

else:
    # a named tuple like the others; fields between ``loss`` and ``decomposition`` are written once, where they are computed
    LossOutput = namedtuple(
        "LossOutput",
        ("loss", *RowLoss._fields, "decomposition", "weights", "purification", "target_logprob"),
        defaults=(None, None),
        module=__name__,
    )
    LossOutput.__doc__ = _LOSS_OUTPUT
