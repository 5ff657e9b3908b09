"""Decomposition of the teacher's signal, Eq. 4: how much of it exists without the question. Two exact ways.

From logits: with x, y the differences of teacher and reference to the student less their vocabulary means, and a, b the
mean log-ratios, each raw moment is the centred one + V·a·b, sums of positive terms for the norms. (Σx² − V·mean² would
lose its digits where a common offset dominates.)

From hidden states, where one head serves all three streams: Σ_v x² = (h_T − h_θ)ᵀ·G·(h_T − h_θ) with the head's centred
Gram matrix G (METHOD identity 3), O(N·D²) and no logit at all. It knows the centred fields; the raw ones need a and b, hence
the three log-normalisers; those weighted by π_θ need the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from popsd.config import Method
from popsd.head import Head, centred_gram, mean_row
from popsd.outputs import Decomposition

FAMILY = 6
"""Fields of a family, in the order of `Decomposition`: raw, centred, weighted."""

FIELDS: dict[str, tuple[str, ...]] = {
    Method.LOGITS.value: Decomposition._fields,
    Method.GRAM.value: Decomposition._fields[FAMILY : 2 * FAMILY],
}
"""What each method, by its value, knows without being told a normaliser."""


def fields_of(moments: torch.Tensor) -> Decomposition:
    """All fields, [N] each, from centred products, weighted products, mean log-ratios of teacher and reference to the
    student, and how many entries they are the means of: [13, N]. Once per call, since it is 100 operations on small vectors.
    """
    a, b, count = moments[10:]
    centred = moments[:5].unbind()
    return Decomposition(*_fields(*_raw(centred, a, b, count)), *_fields(*centred), *_fields(*moments[5:10]))


def decompose_hidden(
    student: torch.Tensor,
    teacher: torch.Tensor,
    reference: torch.Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    log_normalisers: Sequence[torch.Tensor] | None = None,
) -> Decomposition:
    """The centred fields from hidden states [C, D] that share ``head``, without a soft cap; products in float32.

    log_normalisers: of student, teacher and reference, [C] each, log Σ exp of the tempered logits: the raw fields too.
    """
    gram, row, scale = centred_gram(head, vocab_size), mean_row(head, vocab_size), head.logit_scale / temperature
    x, y = ((z.detach().float() - student.detach().float()).mul_(scale) for z in (teacher, reference))
    gx, gy = x @ gram, y @ gram
    z, gz = x - y, gx - gy  # not ‖x‖² − 2x·y + ‖y‖², which cancels where the question adds little
    dot = torch.linalg.vecdot
    centred = [dot(u, v) for u, v in ((x, gx), (y, gy), (z, gz), (x, gy), (x, gz))]
    if log_normalisers is None:
        return Decomposition(*[None] * FAMILY, *_fields(*centred))
    of_student, of_teacher, of_reference = log_normalisers
    a, b = x @ row - (of_teacher - of_student), y @ row - (of_reference - of_student)
    return Decomposition(*_fields(*_raw(centred, a, b, _rows_in_use(head, vocab_size))), *_fields(*centred))


def gather(parts: Sequence[Decomposition]) -> Decomposition:
    """Rows of several chunks as one; a field is there in all of them or in none."""
    columns = zip(*parts, strict=True)
    return Decomposition(*(None if column[0] is None else torch.cat(column) for column in columns))


def _rows_in_use(head: Head, vocab_size: int) -> torch.Tensor | int:
    return vocab_size if head.bias is None else torch.isfinite(head.bias.detach()[:vocab_size]).sum()


def _raw(
    centred: Sequence[torch.Tensor], a: torch.Tensor, b: torch.Tensor, count: torch.Tensor | int
) -> Sequence[torch.Tensor]:
    """Products of the log-ratios themselves, whose means over ``count`` entries are a, b and a − b."""
    shifts = (a * a, b * b, (a - b) * (a - b), a * b, a * (a - b))
    return [x + count * y for x, y in zip(centred, shifts, strict=True)]


def _fields(
    total: torch.Tensor,
    induced: torch.Tensor,
    transferable: torch.Tensor,
    with_reference: torch.Tensor,
    with_transferable: torch.Tensor,
) -> list[torch.Tensor]:
    # the squares of both quadratic form and kernel are sums that may cancel to a rounding below 0
    total, induced, transferable = (x.clamp_min(0.0).sqrt() for x in (total, induced, transferable))
    return [
        total,
        induced,
        transferable,
        _ratio(with_reference, total * induced),
        _ratio(with_transferable, total * transferable),
        _ratio(induced, total),
    ]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
