"""Decomposition of the teacher's signal, Eq. 4: how much of it exists without the question. Two exact ways.

From logits: with x, y the differences of teacher and reference to the student less their vocabulary means, and a, b the
mean log-ratios, each raw moment is the centred one + V·a·b, sums of positive terms for the norms. (Σx² − V·mean² would
lose its digits where a common offset dominates.)

From hidden states, where one head serves all three streams: Σ_v x² = (h_T − h_θ)ᵀ·G·(h_T − h_θ) with the head's centred
Gram matrix G, O(N·D²) and no logit at all. It knows the centred fields; the raw ones need a and b, hence the three
log-normalisers; those weighted by π_θ need the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from popsd.engine.backends import Backend
from popsd.engine.problem import Problem
from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd.engine.workspace import slices
from popsd.head import Head, centred_gram, mean_row
from popsd.outputs import FAMILY, Decomposition
from popsd_kernels.rows import Rows

DIAGNOSTIC_ELEMENTS = 1 << 24
"""Elements per stream that a diagnostic in plain torch sees at once: 64 MiB per temporary, beside the workspace."""


def moment_rows(problem: Problem, backend: Backend, rows: Rows) -> torch.Tensor:
    """What `fields_of` takes, [13, n] float32. The rows have the reference, and teacher or difference."""
    biased = rows.student_bias is not None or rows.frozen_bias is not None
    return backend.moments(rows, problem.row_options, masked=problem.tensors.student_weight is None or biased)


def by_gram(problem: Problem) -> Decomposition:
    """The centred fields, [N] each, beside whatever the sweeps do."""
    tensors, options = problem.tensors, problem.options
    assert tensors.student_weight is not None and tensors.reference is not None
    return decompose_hidden(
        (tensors.student, tensors.teacher, tensors.reference),
        Head(tensors.student_weight, tensors.student_bias, options.student_scale),
        vocab_size=problem.vocab_size,
        temperature=options.temperature,
        gram=tensors.gram,
        over=problem.vocabulary,
    )


def fields_of(moments: torch.Tensor) -> Decomposition:
    """All fields, [N] each, from `row_moments` [13, N]: centred inner products, weighted ones, mean log-ratios of teacher and
    reference to the student, and how many entries they are the means of. Once per call: it is 100 operations on small vectors.
    """
    a, b, count = moments[10:]
    centred = moments[:5].unbind()
    return Decomposition(*_fields(*_raw(centred, a, b, count)), *_fields(*centred), *_fields(*moments[5:10]))


def decompose_hidden(
    streams: Sequence[torch.Tensor],
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    gram: torch.Tensor | None = None,
    log_normalisers: Sequence[torch.Tensor] | None = None,
    over: Vocabulary = WHOLE,
) -> Decomposition:
    """The centred fields, [N] each, from hidden states of student, teacher and reference [N, D] that share ``head``, without a
    soft cap. Matmuls in float32, a few rows at a time.

    gram: [D, D] float32, `centred_gram` of the head. log_normalisers: of the three streams, [N] each, log Σ exp of the
    tempered logits: the raw fields too.
    """
    if gram is None:
        gram = centred_gram(head.weight, head.bias, vocab_size, over)
    row = None if log_normalisers is None else mean_row(head.weight, head.bias, vocab_size, over)
    bias = None if head.bias is None else head.bias.detach()[:vocab_size]
    count = over.entries(vocab_size) if bias is None else over.sum(torch.isfinite(bias).sum())
    scale, dot, parts = head.logit_scale / temperature, torch.linalg.vecdot, []
    step = max(1, DIAGNOSTIC_ELEMENTS // gram.shape[0])
    for piece in slices(slice(0, max(streams[0].shape[0], 1)), step):
        student, teacher, reference = (x.detach()[piece].float() for x in streams)
        x, y = ((z - student).mul_(scale) for z in (teacher, reference))
        gx, gy = x @ gram, y @ gram
        z, gz = x - y, gx - gy  # not ‖x‖² − 2x·y + ‖y‖², which cancels where the question adds little
        centred = [dot(u, v) for u, v in ((x, gx), (y, gy), (z, gz), (x, gy), (x, gz))]
        raw: Sequence[torch.Tensor | None] = [None] * FAMILY
        if row is not None and log_normalisers is not None:
            of_student, of_teacher, of_reference = (lse[piece] for lse in log_normalisers)
            a, b = x @ row - (of_teacher - of_student), y @ row - (of_reference - of_student)
            raw = _fields(*_raw(centred, a, b, count))
        parts.append(Decomposition(*raw, *_fields(*centred)))
    return Decomposition(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))


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
        _ratio(with_reference, total * induced).clamp(-1.0, 1.0),  # rounding: 1.0000002 of parallel ones
        _ratio(with_transferable, total * transferable).clamp(-1.0, 1.0),
        _ratio(induced, total),
    ]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
