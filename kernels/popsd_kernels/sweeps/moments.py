"""The decomposition of the teacher's signal (Eq. 4) as 13 sums per token, from which every norm and cosine follows.

One read of student, teacher (or its difference to the reference) and reference, 12 bytes per entry in float32. The sums wanted
are about values that only the end of the row knows: the plain ones about the mean log-ratio, the weighted ones about the
difference of the log-normalisers. They are taken about a pivot and moved there. Which pivot decides the digits: the weighted
products live at the likely tokens, where log-ratios are a hundred times smaller than their mean over the vocabulary, and
Σ w·x² + 2c·Σ w·x + c²·Σ w about a mean would lose four digits there. So the pivot is the log-ratio at the likeliest token
that a lane has met: moved from there, the entries that weigh anything are moved by next to nothing.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.checks import check_rows
from popsd_kernels.device.logits import floor_logit, load_entries, load_logit
from popsd_kernels.device.operands import difference_operand, frozen_operand, student_operand
from popsd_kernels.device.primitives import (
    LOG2E,
    NOTHING,
    fma,
    lse_accumulate,
    lse_accumulate_sum,
    lse_finish,
    negative,
    rounded_product,
)
from popsd_kernels.launch import Launch, LaunchConfig, Outputs, fast_instructions, result_rows
from popsd_kernels.rows import MOMENTS, SHARD_MOMENTS, RowOptions, Rows

_NAME = "row_moments"
WEIGHTED, MEAN_TOTAL, MEAN_REFERENCE, ENTRIES = (tl.constexpr(row) for row in (5, 10, 11, 12))
"""Rows of the result where the weighted products begin, after the five plain ones, and what stands behind them."""


def row_moments(rows: Rows, options: RowOptions, *, masked: bool = True) -> torch.Tensor:
    """Moments of Δ_total = log π_T − log π_θ, Δ_ref = log π_ref − log π_θ and Δ_it = log π_T − log π_ref per token.

    rows: student, reference, and either teacher or difference (teacher − reference), with which the teacher's logits are the
        reference's plus inv_temperature · delta_scale · difference. Read only; no other stream is used.
    options: logit transforms, temperature and ``minus_student``, with which ``rows.reference`` holds its difference to the
        student (and ``rows.difference`` is needed); nothing else of it is used.
    masked: whether a logit may be −inf (or LOGIT_FLOOR). Such entries leave every sum; False saves looking for them.
    Returns [13, C] float32: ‖Δ_total‖², ‖Δ_ref‖², ‖Δ_it‖², Δ_total·Δ_ref, Δ_total·Δ_it of the log-ratios less their means
    over the vocabulary; the same five of the log-ratios themselves, each entry weighted by π_θ; mean Δ_total, mean Δ_ref;
    the number of entries. Raises ValueError, TypeError or RuntimeError before any launch. Not yet run on a GPU.
    """
    return shard_moments(rows, options, masked=masked)[:MOMENTS]


def shard_moments(rows: Rows, options: RowOptions, *, masked: bool = True) -> torch.Tensor:
    """The moments of `row_moments` over some of the vocabulary's entries, and what it takes to merge them with others'.

    Returns [21, C] float32: those 13; Σ Δ_total and Σ Δ_ref, each entry weighted by π_θ; and of student, reference and teacher
    each the largest logit and log Σ exp(z − max).
    """
    check_rows(_NAME, rows, options, needed=("reference",))
    if (rows.teacher is None) == (rows.difference is None):
        given = "both" if rows.teacher is not None else "neither"
        raise ValueError(
            f"{_NAME}: one of rows.teacher and rows.difference must be given, got {given}; leave the other out"
        )
    if options.minus_student and rows.difference is None:
        raise ValueError(
            f"{_NAME}: rows.difference must be given where options.minus_student is True, got rows.teacher; "
            "pass their difference"
        )
    tokens, device = rows.student.shape[0], rows.student.device
    out = result_rows(SHARD_MOMENTS, tokens, device)
    if tokens:
        config = launch.shipped_config("moments", device)
        plan(rows, options, masked, Outputs(out), config, fast_instructions(device)).run(device)
    return out


def plan(rows: Rows, options: RowOptions, masked: bool, outputs: Outputs, config: LaunchConfig, fast: bool) -> Launch:
    """The launch that `row_moments` makes, unchecked. outputs: [21, C]."""
    assert rows.reference is not None
    return Launch(
        row_moments_kernel,
        rows.student.shape[0],
        {
            "student": student_operand(rows, options),
            "reference": frozen_operand(rows.reference, rows, options),
            "teacher": None if rows.teacher is None else frozen_operand(rows.teacher, rows, options),
            "difference": difference_operand(rows, options),
            "out_ptr": outputs.results,
            "out_row_stride": outputs.results.stride(0),
            "V": rows.student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "MASKED": masked,
            "MINUS_STUDENT": options.minus_student,
            "FAST": fast,
        },
        config,
    )


class Pivot(NamedTuple):
    """The logit of the likeliest token a lane has met and the log-ratios there, [BLOCK // VEC] each."""

    logit: Any
    x: Any
    y: Any


class Sums(NamedTuple):
    """Of weights, and of weighted products of x = Δ_total, y = Δ_ref and z = x − y less their pivots, [BLOCK // VEC] each."""

    weight: Any
    x: Any
    y: Any
    xx: Any
    yy: Any
    zz: Any
    xz: Any


class State(NamedTuple):
    """Online log-sum-exps of student, reference and teacher, and the sums; the weights are exp(s − s_top)."""

    s_top: Any
    s_total: Any
    r_top: Any
    r_total: Any
    t_top: Any
    t_total: Any
    pivot: Pivot
    plain: Sums
    weighted: Sums


@triton.jit(do_not_specialize=["out_row_stride"])
def row_moments_kernel(
    student,
    reference,
    teacher,
    difference,
    out_ptr,
    out_row_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    MASKED: tl.constexpr,
    MINUS_STUDENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token. Full blocks run unmasked; a vocabulary that BLOCK does not divide has one masked tail."""
    row, full = tl.program_id(0), V // BLOCK * BLOCK
    zero = tl.zeros([BLOCK // VEC], tl.float32)
    none, low = Sums(zero, zero, zero, zero, zero, zero, zero), zero + NOTHING
    state = State(low, zero, low, zero, low, zero, Pivot(low, zero, zero), none, none)
    for start in range(0, full, BLOCK):
        s, r, t, inside = _streams(
            student, reference, teacher, difference, row, start + tl.arange(0, BLOCK), V, False, MASKED, MINUS_STUDENT, FAST
        )  # fmt: skip
        state = _accumulate(state, s, r, t, inside, VEC, MASKED, MINUS_STUDENT)
    if full < V:
        s, r, t, inside = _streams(
            student, reference, teacher, difference, row, full + tl.arange(0, BLOCK), V, True, MASKED, MINUS_STUDENT, FAST
        )  # fmt: skip
        state = _accumulate(state, s, r, t, inside, VEC, True, MINUS_STUDENT)
    s_max, s_logsum = lse_finish(state.s_top, state.s_total, V)
    r_max, r_logsum = lse_finish(state.r_top, state.r_total, V)
    t_max, t_logsum = lse_finish(state.t_top, state.t_total, V)
    x_shift = (t_max - s_max) + (t_logsum - s_logsum)
    y_shift = (r_max - s_max) + (r_logsum - s_logsum)
    count, pivot = tl.sum(state.plain.weight, axis=0), state.pivot
    entries = tl.where(count > 0, count, 1.0)  # of no common entry every field is 0
    x_mean = tl.sum(fma(pivot.x, state.plain.weight, state.plain.x), axis=0) / entries
    y_mean = tl.sum(fma(pivot.y, state.plain.weight, state.plain.y), axis=0) / entries
    out_ptr += row
    _store(out_ptr, _moved(state.plain, pivot.x - x_mean, pivot.y - y_mean, 1.0), out_row_stride)
    share = tl.exp2((state.s_top - s_max) * LOG2E - s_logsum * LOG2E)
    weighted = _moved(state.weighted, pivot.x - x_shift, pivot.y - y_shift, share)
    _store(out_ptr + WEIGHTED * out_row_stride, weighted, out_row_stride)
    tl.store(out_ptr + MEAN_TOTAL * out_row_stride, x_mean - x_shift)
    tl.store(out_ptr + MEAN_REFERENCE * out_row_stride, y_mean - y_shift)
    tl.store(out_ptr + ENTRIES * out_row_stride, count)
    _store_normalisers(
        out_ptr + (ENTRIES + 1) * out_row_stride,
        weighted,
        s_max,
        s_logsum,
        r_max,
        r_logsum,
        t_max,
        t_logsum,
        out_row_stride,
    )


@triton.jit
def _streams(
    student,
    reference,
    teacher,
    difference,
    row,
    columns,
    V: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
    MINUS_STUDENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block's floored logits, reference and teacher less the student where MINUS_STUDENT, and which entries are possible in
    all three. TAIL: some are beyond the vocabulary."""
    s = floor_logit(load_logit(student, row, columns, V, TAIL, FAST), columns, V, TAIL)
    r, lowest = load_logit(reference, row, columns, V, TAIL, FAST), s
    if not MINUS_STUDENT:
        r = floor_logit(r, columns, V, TAIL)
        lowest = tl.minimum(s, r, propagate_nan=tl.PropagateNan.ALL)
    if difference is None:  # not `teacher`: Triton 3.6 cannot compare with None a tuple that holds one
        t = floor_logit(load_logit(teacher, row, columns, V, TAIL, FAST), columns, V, TAIL)
        lowest = tl.minimum(lowest, t, propagate_nan=tl.PropagateNan.ALL)
    else:
        delta = load_entries(difference.ptr, row, difference.row_stride, columns, V, TAIL)
        t = r + delta * tl.cast(difference.gain, tl.float32)
    inside = columns < V
    if MASKED:  # whatever scale or temperature the floor went through; a NaN counts, and so reaches the sums
        inside = inside & ~(lowest <= NOTHING)
    return s, r, t, inside


@triton.jit
def _accumulate(state, s, r, t, inside, VEC: tl.constexpr, PARTIAL: tl.constexpr, MINUS_STUDENT: tl.constexpr):
    """The state with a block more. PARTIAL: whether an entry may not be ``inside``."""
    s_top, s_total = lse_accumulate(s, state.s_top, state.s_total, VEC)
    if MINUS_STUDENT:
        x, y = t, r
        r_top, r_total = lse_accumulate_sum(s, r, state.r_top, state.r_total, VEC, 1.0, 1.0)
        t_top, t_total = lse_accumulate_sum(s, t, state.t_top, state.t_total, VEC, 1.0, 1.0)
    else:
        x, y = t - s, r - s
        r_top, r_total = lse_accumulate(r, state.r_top, state.r_total, VEC)
        t_top, t_total = lse_accumulate(t, state.t_top, state.t_total, VEC)
    shape: tl.constexpr = [s.shape[0] // VEC, VEC]
    s, x, y = tl.reshape(s, shape), tl.reshape(x, shape), tl.reshape(y, shape)
    origin = rounded_product(s_top, LOG2E)
    one, w = tl.full(shape, 1.0, tl.float32), tl.exp2(fma(s, LOG2E, negative(origin)[:, None]))
    if PARTIAL:
        inside = tl.reshape(inside, shape)
        one, w, s = tl.where(inside, 1.0, 0.0), tl.where(inside, w, 0.0), tl.where(inside, s, NOTHING)
    pivot, old = _likelier(state.pivot, s, x, y), state.pivot
    shrink = tl.exp2(rounded_product(state.s_top, LOG2E) - origin)
    x, y, dx, dy = x - pivot.x[:, None], y - pivot.y[:, None], old.x - pivot.x, old.y - pivot.y
    if PARTIAL:
        x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    plain = _more(_moved(state.plain, dx, dy, 1.0), one, x, y)
    weighted = _more(_moved(state.weighted, dx, dy, shrink), w, x, y)
    return State(s_top, s_total, r_top, r_total, t_top, t_total, pivot, plain, weighted)


@triton.jit
def _likelier(pivot, s, x, y):
    """The pivot, or what a block [BLOCK // VEC, VEC] has instead. Of equally likely entries any one's values will do."""
    best = tl.max(s, axis=1)
    here, better = s == best[:, None], best > pivot.logit
    return Pivot(
        tl.maximum(best, pivot.logit),
        tl.where(better, tl.max(tl.where(here, x, NOTHING), axis=1), pivot.x),
        tl.where(better, tl.max(tl.where(here, y, NOTHING), axis=1), pivot.y),
    )


@triton.jit
def _moved(sums, dx, dy, factor):
    """The sums of values that are larger by dx and dy, with weights ``factor`` times as large."""
    dz, z = dx - dy, sums.x - sums.y
    return Sums(
        factor * sums.weight,
        factor * fma(dx, sums.weight, sums.x),
        factor * fma(dy, sums.weight, sums.y),
        factor * fma(dx, fma(dx, sums.weight, 2.0 * sums.x), sums.xx),
        factor * fma(dy, fma(dy, sums.weight, 2.0 * sums.y), sums.yy),
        factor * fma(dz, fma(dz, sums.weight, 2.0 * z), sums.zz),
        factor * fma(dz, fma(dx, sums.weight, sums.x), fma(dx, z, sums.xz)),
    )


@triton.jit
def _more(sums, w, x, y):
    """The sums with a block [BLOCK // VEC, VEC] of weights and values about the pivot."""
    z = x - y
    wx, wy, wz = w * x, w * y, w * z
    return Sums(
        sums.weight + tl.sum(w, axis=1),
        sums.x + tl.sum(wx, axis=1),
        sums.y + tl.sum(wy, axis=1),
        sums.xx + tl.sum(wx * x, axis=1),
        sums.yy + tl.sum(wy * y, axis=1),
        sums.zz + tl.sum(wz * z, axis=1),
        sums.xz + tl.sum(wx * z, axis=1),
    )


@triton.jit
def _store(pointer, sums, stride):
    """Δ_total·Δ_ref is what Δ_total·Δ_it leaves of ‖Δ_total‖²."""
    total, with_transferable = tl.sum(sums.xx, axis=0), tl.sum(sums.xz, axis=0)
    tl.store(pointer, total)
    tl.store(pointer + stride, tl.sum(sums.yy, axis=0))
    tl.store(pointer + 2 * stride, tl.sum(sums.zz, axis=0))
    tl.store(pointer + 3 * stride, total - with_transferable)
    tl.store(pointer + 4 * stride, with_transferable)


@triton.jit
def _store_normalisers(pointer, weighted, s_max, s_logsum, r_max, r_logsum, t_max, t_logsum, stride):
    """What `shard_moments` has more: weighted sums of the log-ratios, and three normalisers."""
    tl.store(pointer, tl.sum(weighted.x, axis=0))
    tl.store(pointer + stride, tl.sum(weighted.y, axis=0))
    tl.store(pointer + 2 * stride, s_max)
    tl.store(pointer + 3 * stride, s_logsum)
    tl.store(pointer + 4 * stride, r_max)
    tl.store(pointer + 5 * stride, r_logsum)
    tl.store(pointer + 6 * stride, t_max)
    tl.store(pointer + 7 * stride, t_logsum)
