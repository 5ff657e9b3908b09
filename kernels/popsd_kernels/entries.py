"""Both distributions of a row, block by block, from the logits and sweep 1's normalisers: what sweep 2 works on."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels.logits import floor_logit, load_logit
from popsd_kernels.primitives import LOG2E


class RowScalars(NamedTuple):
    """Normalisers of a row, the logarithms base 2; ``shift`` turns u - s into log2(q / p)."""

    student_max: Any
    student_log2sum: Any
    target_max: Any
    target_log2sum: Any
    shift: Any


class Entries(NamedTuple):
    """A block of a row [BLOCK]: probabilities, their base-2 logarithms, t = log2(q / p), student logit."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any
    t: Any
    s: Any


@triton.jit
def row_scalars(statistics, row):
    """The RowScalars of one row from sweep 1's four [C] vectors."""
    student_max, student_logsum = tl.load(statistics[0] + row), tl.load(statistics[1] + row)
    target_max, target_logsum = tl.load(statistics[2] + row), tl.load(statistics[3] + row)
    return scalars_from(student_max, student_logsum, target_max, target_logsum)


@triton.jit
def scalars_from(student_max, student_logsum, target_max, target_logsum):
    """The RowScalars of one row from its four normalisers."""
    shift = ((target_max - student_max) + (target_logsum - student_logsum)) * LOG2E
    return RowScalars(student_max, student_logsum * LOG2E, target_max, target_logsum * LOG2E, shift)


@triton.jit
def row_entries(student, target, scalars, row, columns, V: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr):
    """A block of both distributions, loaded."""
    s = floor_logit(load_logit(student, row, columns, V, MASKED, FAST), columns, V, MASKED)
    u = load_logit(target, row, columns, V, MASKED, FAST)
    if target.gain is not None:  # finished logits are floored already
        u = floor_logit(u, columns, V, MASKED)
    return entries_from(s, u, scalars, columns, V, MASKED)


@triton.jit
def entries_from(s, u, scalars, columns, V: tl.constexpr, MASKED: tl.constexpr):
    """A block of both distributions from their floored logits; beyond the vocabulary p = q = 0.

    t comes from the difference of the logits, not of the log-probabilities: s and u nearly agree where it matters, and
    their difference is then exact (loss error 3-6e-6 against 4-8e-7 in float32, float64 reference).
    """
    log_p = (s - scalars.student_max) * LOG2E - scalars.student_log2sum
    log_q = (u - scalars.target_max) * LOG2E - scalars.target_log2sum
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    if MASKED:  # a row that is LOGIT_FLOOR throughout is uniform, and the floor beyond the vocabulary would count
        p = tl.where(columns < V, p, 0.0)
        q = tl.where(columns < V, q, 0.0)
    return Entries(p, q, log_p, log_q, (u - s) * LOG2E - scalars.shift, s)
