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
from popsd.torch_tiles import LN2, LOG2E, StudentRows, scratch, student_rows, tempered_logits
from popsd.types import Decomposition, Head, centred_gram, mean_row
from popsd_kernels.options import LOGIT_FLOOR, RowOptions

Products = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""‖Δ_total‖², ‖Δ_ref‖², ‖Δ_it‖², Δ_total·Δ_ref, Δ_total·Δ_it, [C] each."""

FAMILY = 6
"""Fields of a family, in the order of `Decomposition`: raw, centred, weighted."""

FIELDS: dict[str, tuple[str, ...]] = {
    Method.LOGITS.value: Decomposition._fields,
    Method.GRAM.value: Decomposition._fields[FAMILY : 2 * FAMILY],
}
"""What each method, by its value, knows without being told a normaliser."""


def row_moments(
    student: torch.Tensor,
    reference: torch.Tensor,
    *,
    teacher: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
    options: RowOptions,
    masked: bool = True,
    rows: StudentRows | None = None,
) -> torch.Tensor:
    """The torch body of ``popsd_kernels.row_moments``: [13, C] moments, see `fields_of`, from raw projections [C, V].

    With ``delta`` the teacher is the reference plus its multiple. masked: whether a logit may be -inf.
    rows: `student_rows` of the same arguments where somebody has them already.
    """
    rows = rows or student_rows(student, student_bias, options)
    total, induced, free = scratch(student, 3)
    bias = None if options.relative else target_bias
    finite = options.relative or not masked
    other = tempered_logits(reference, bias, options.target, options, out=induced, finite=finite)
    if teacher is None:
        assert delta is not None
        own = torch.add(other, delta, alpha=options.delta_scale * options.inv_temperature, out=total)
    else:
        own = tempered_logits(teacher, bias, options.target, options, out=total, finite=finite)
    outside, count = None, torch.full_like(rows.maximum[:, 0], student.shape[1])
    if masked:
        least = rows.logits
        if not options.relative:
            least = torch.minimum(least, torch.minimum(own, other, out=free), out=free)
        outside = least < 1e-6 * LOGIT_FLOOR  # whatever scale or temperature the floor went through
        count -= outside.sum(dim=1)
    shifts = [_log_normaliser_ratio(_bits(z, rows, relative=options.relative, out=free), rows) for z in (own, other)]
    if not options.relative:
        own, other = torch.sub(own, rows.logits, out=total), torch.sub(other, rows.logits, out=induced)
    means = [_centre(x, outside, count, out) for x, out in ((own, total), (other, induced))]
    a, b = (mean - shift for mean, shift in zip(means, shifts, strict=True))
    centred = _products(total, induced, free)
    root = torch.sqrt(rows.probabilities, out=free)
    if outside is not None:
        root.masked_fill_(outside, 0.0)
    total.add_(a[:, None]).mul_(root)
    induced.add_(b[:, None]).mul_(root)
    weighted = _products(total, induced, free)
    return torch.stack([*centred, *weighted, a, b, count])


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


def _bits(z: torch.Tensor, rows: StudentRows, *, relative: bool, out: torch.Tensor) -> torch.Tensor:
    """Logits less the student's maximum, in bits; ``relative``: z is what they are more than the student's."""
    if relative:
        return torch.add(rows.bits, z, alpha=LOG2E, out=out)
    return torch.sub(z, rows.maximum, out=out).mul_(LOG2E)


def _log_normaliser_ratio(bits: torch.Tensor, rows: StudentRows) -> torch.Tensor:
    """log Z / Z_θ of logits from `_bits`, [C]; overwrites them.

    By the arithmetic of the student's own normaliser, so that equal policies give exactly 0; maximum and log-sum apart,
    whose sum would round at the size of a logit.
    """
    top = bits.amax(dim=1, keepdim=True)
    logsum = bits.sub_(top).exp2_().sum(dim=1, keepdim=True).log_()
    return (LN2 * top + (logsum - rows.logsum))[:, 0]


def _centre(x: torch.Tensor, outside: torch.Tensor | None, count: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x less its mean over the entries inside, 0 outside, into ``out``, which may be x; returns the mean [C]."""
    if outside is not None:
        x = out.copy_(x).masked_fill_(outside, 0.0)
    mean = x.sum(dim=1) / count
    torch.sub(x, mean[:, None], out=out)
    if outside is not None:
        out.masked_fill_(outside, 0.0)
    return mean


def _products(total: torch.Tensor, induced: torch.Tensor, free: torch.Tensor) -> Products:
    """The norms each from its own entries: ‖x‖² − 2x·y + ‖y‖² cancels where the question adds little.

    Δ_total·Δ_ref is left over of them. Not `vecdot`, whose product goes into fresh memory: 240 µs against 25 µs for 2^17
    elements (torch 2.13, one core).
    """
    norm = torch.linalg.vector_norm
    squares = [norm(x, dim=1).square() for x in (total, induced)]
    transferable = norm(torch.sub(total, induced, out=free), dim=1).square()
    with_transferable = torch.mul(total, free, out=free).sum(dim=1)
    return squares[0], squares[1], transferable, squares[0] - with_transferable, with_transferable


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
