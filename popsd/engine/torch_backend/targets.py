"""Logits of the target from raw projections, in torch: tempered, differenced, purified (Eq. 13-17)."""

from __future__ import annotations

import torch

from popsd.engine.torch_backend.scratch import DIFFERENCE, scratch
from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd_kernels.rows import LOGIT_FLOOR, LogitTransform, RowOptions, Rows

SIGMOID_CLIP = 32.0
"""The largest ``pmi_clip`` whose tanh may be formed as 2c·σ − c, which rounds at 6e-8·c whatever the size of Δ̃: at a KL of
1e-3 gradients are off by 5e-6 at c = 10, 1.4e-5 at 32, 3e-5 at 64 and 5e-3 at 1e4 (float32 is documented with 2e-5)."""


def logit_difference(
    rows: Rows, options: RowOptions, *, center: bool, out: torch.Tensor, over: Vocabulary = WHOLE
) -> torch.Tensor:
    """Eq. 13: teacher's logits less the reference's into ``out`` [C, V] float32, and their offset [C] float32.

    Δ̄ = inv_temperature · out − offset, with the offset the vocabulary mean (Eq. 14) or, uncentred, the difference of the
    log-normalisers. Entries outside the support of either get the value that makes Δ̄ zero. ``out`` may be either input.
    """
    assert rows.teacher is not None and rows.reference is not None
    z_teacher, z_reference, free = scratch(rows.teacher, DIFFERENCE)
    for raw, z in ((rows.teacher, z_teacher), (rows.reference, z_reference)):
        tempered_logits(raw, rows.frozen_bias, options.target, options, out=z)
    floor = 0.5 * LOGIT_FLOOR * options.target.scale * options.inv_temperature
    outside = torch.minimum(z_teacher, z_reference, out=free) <= floor
    offset = None
    if not center:
        teacher, reference = over.logsumexp(torch.stack([torch.logsumexp(z, dim=1) for z in (z_teacher, z_reference)]))
        offset = teacher - reference
    difference = z_teacher.sub_(z_reference).masked_fill_(outside, 0.0)
    if offset is None:
        total, inside = over.sums(difference.sum(dim=1), outside.shape[1] - outside.sum(dim=1))
        offset = total / inside.clamp_min(1)  # without a common entry there is no signal, and the target is the base
    torch.where(outside, offset[:, None], difference, out=difference)
    torch.mul(difference, 1.0 / options.inv_temperature, out=out)
    return offset


def tempered_logits(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    options: RowOptions,
    *,
    out: torch.Tensor | None = None,
    finite: bool = False,
) -> torch.Tensor:
    """Raw projections → tempered float32 logits in ``out``, floored so that -inf never meets -inf.

    finite: there is none; where nothing else is to be done either, ``raw`` itself comes back and ``out`` is left alone.
    """
    factor = transform.scale * options.inv_temperature
    if finite and bias is None and transform.softcap is None and factor == 1.0 and raw.dtype == torch.float32:
        return raw
    z = torch.empty_like(raw, dtype=torch.float32) if out is None else out
    if bias is None and raw.dtype == torch.float32:
        torch.clamp_min(raw, LOGIT_FLOOR, out=z)
    else:
        # a float32 bias, or two 16-bit operands would be added in 16 bits before they reach ``z``
        (z.copy_(raw) if bias is None else torch.add(raw, bias.float(), out=z)).clamp_min_(LOGIT_FLOOR)
    if transform.softcap is not None:
        z.mul_(transform.scale / transform.softcap).tanh_().mul_(transform.softcap * options.inv_temperature)
    elif factor != 1.0:
        z.mul_(factor)
    return z


def target_logits(rows: Rows, options: RowOptions, out: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """The target's tempered logits [C, V]: its own or, with a difference, composed on the base's. Where
    ``options.minus_student``, less the student's. In ``out``, or ``rows.target`` itself; ``free`` is overwritten."""
    if rows.target_is_finished:
        return torch.clamp_min(rows.frozen, LOGIT_FLOOR, out=out)
    bias = None if options.minus_student else rows.frozen_bias
    own = tempered_logits(rows.frozen, bias, options.target, options, out=out, finite=options.minus_student)
    if rows.difference is None:
        return own
    assert rows.offset is not None
    return torch.add(own, purified_shift(rows.difference, rows.offset, options, out=free), out=out)


def purified_shift(
    delta: torch.Tensor, offset: torch.Tensor, options: RowOptions, *, out: torch.Tensor
) -> torch.Tensor:
    """Δ̃ / pmi_beta from raw differences, Eq. 14-16."""
    clip, beta = options.pmi_clip, options.pmi_beta
    # c·tanh(x/c) as 2c·σ(2x/c) − c: vectorised tanh takes six times as long as sigmoid in torch 2.13 on AVX-512
    as_sigmoid = clip is not None and clip <= SIGMOID_CLIP
    gain = 1.0 / beta if clip is None else (2.0 if as_sigmoid else 1.0) / clip
    alpha = gain * options.delta_scale * options.inv_temperature
    scaled = torch.add(-gain * offset[:, None], delta, alpha=alpha, out=out)
    if clip is None:
        return scaled
    if as_sigmoid:
        return scaled.sigmoid_().mul_(2.0 * clip / beta).sub_(clip / beta)
    return scaled.tanh_().mul_(clip / beta)
