"""Both distributions of a row, block by block, from the logits and sweep 1's normalisers: what sweep 2 works on."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels.device.divergence import FORWARD
from popsd_kernels.device.logits import floor_logit, load_logit, load_scaled, stream_gain
from popsd_kernels.device.primitives import LOG2E, NOTHING, fma, negative


class RowScalars(NamedTuple):
    """Normalisers of a row, the logarithms base 2; u - s - ``shift`` is log(q / p).

    student_line, target_line: `Line` of log2 p over s and of log2 q over u.
    """

    student_max: Any
    student_log2sum: Any
    target_max: Any
    target_log2sum: Any
    shift: Any
    student_line: Any
    target_line: Any


class Line(NamedTuple):
    """log2 p = unit * s - origin + rounding, with origin the rounded max * LOG2E + log2sum: leaving out ``rounding`` makes a
    factor 1 + 1e-6 common to the row. unit is the logits' gain * LOG2E, and origin allows for its rounding at the likeliest
    entry; it is 0 where no entry is possible, so that such a row is uniform."""

    unit: Any
    origin: Any
    rounding: Any


class Entries(NamedTuple):
    """A block of a row [BLOCK]: probabilities, their base-2 logarithms, t = log2(q / p), student logit but for its gain."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any
    t: Any
    s: Any


@triton.constexpr_function
def exact_logarithms(mode, entry_clip):
    """Whether each entry needs its logarithms without the factor that `Line` leaves out; else it is taken out of the sums.

    Where Σ p·(...) is subtracted from an entry's own value (reverse KL, JSD, and any mode that caps entries) the factor would
    show: one entry in a thousand has nothing else left (forward KL, half of the entries capped: gradient off by 1e-4).
    """
    return mode != FORWARD.value or entry_clip is not None


@triton.jit
def row_scalars(statistics, row, student_gain=None):
    """The RowScalars of one row from sweep 1's four [C] vectors. student_gain: see `entries_from`; None is 1."""
    student_max, student_logsum = tl.load(statistics[0] + row), tl.load(statistics[1] + row)
    target_max, target_logsum = tl.load(statistics[2] + row), tl.load(statistics[3] + row)
    return scalars_from(student_max, student_logsum, target_max, target_logsum, student_gain)


@triton.jit
def scalars_from(student_max, student_logsum, target_max, target_logsum, student_gain=None):
    """The RowScalars of one row from its four normalisers."""
    shift = (target_max - student_max) + (target_logsum - student_logsum)
    student_log2sum, target_log2sum = student_logsum * LOG2E, target_logsum * LOG2E
    return RowScalars(
        student_max, student_log2sum, target_max, target_log2sum, shift,
        _line(student_max, student_log2sum, student_gain), _line(target_max, target_log2sum, None),
    )  # fmt: skip


@triton.jit
def _line(row_max, log2sum, gain):
    slope = LOG2E if gain is None else LOG2E * gain
    unit = tl.where(row_max < NOTHING, 0.0, slope)
    row_max = tl.where(row_max < NOTHING, 0.0, row_max)
    if gain is not None:
        top = row_max / gain
        log2sum = fma(fma(top, negative(gain), row_max), LOG2E, log2sum)
        row_max = top
    origin = fma(row_max, slope, log2sum)
    return Line(unit, origin, -(fma(row_max, slope, -origin) + log2sum))


@triton.jit
def row_entries(
    student,
    target,
    scalars,
    row,
    columns,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
    EXACT: tl.constexpr = True,
    MINUS_STUDENT: tl.constexpr = False,
):
    """A block of both distributions, loaded. MINUS_STUDENT: ``target`` holds u - s."""
    if target.gain is None:  # finished logits, floored already
        s, gain = load_scaled(student, row, columns, V, MASKED, FAST), stream_gain(student)
        u = load_logit(target, row, columns, V, MASKED, FAST)
    else:  # both rounded alike, so that equal distributions differ by exactly 0
        s, gain = load_logit(student, row, columns, V, MASKED, FAST), 1.0
        u = floor_logit(load_logit(target, row, columns, V, MASKED, FAST), columns, V, MASKED)
    s, difference = floor_logit(s, columns, V, MASKED), None
    if MINUS_STUDENT:
        u, difference = fma(s, gain, u), u
    return entries_from(s, u, scalars, columns, V, MASKED, gain, EXACT, difference)


@triton.jit
def entries_from(
    s, u, scalars, columns, V: tl.constexpr, MASKED: tl.constexpr, gain=1.0, EXACT: tl.constexpr = True, difference=None
):
    """A block of both distributions from their floored logits gain * s and u; beyond the vocabulary p = q = 0.

    t comes from the difference of the logits, not of the log-probabilities: s and u nearly agree where it matters, and
    their difference is then exact (loss error 3-6e-6 against 4-8e-7 in float32, float64 reference); where it is known
    apart from them (``difference``) it has no rounding of theirs at all. The shift is taken from
    it before any product: where one entry has nearly all the mass, t is what is left of the two.
    EXACT: as `exact_logarithms` says. Without, the `Line`s' rounding is left out, an instruction less per logarithm.
    """
    if EXACT:
        log_p = fma(fma(s, gain, -scalars.student_max), LOG2E, -scalars.student_log2sum)
        log_q = fma(u - scalars.target_max, LOG2E, -scalars.target_log2sum)
    else:
        log_p = fma(s, scalars.student_line.unit, -scalars.student_line.origin)
        log_q = fma(u, scalars.target_line.unit, -scalars.target_line.origin)
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    if MASKED:  # a row that is LOGIT_FLOOR throughout is uniform, and the floor beyond the vocabulary would count
        p = tl.where(columns < V, p, 0.0)
        q = tl.where(columns < V, q, 0.0)
    if difference is None:
        difference = fma(s, -gain, u)
    return Entries(p, q, log_p, log_q, (difference - scalars.shift) * LOG2E, s)
