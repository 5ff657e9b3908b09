"""The decomposition of the teacher's signal (Eq. 4) as 13 sums per token, from which every norm and cosine follows.

Two reads of student, teacher (or its difference to the reference) and reference, 24 bytes per entry in float32: first the
normalisers and the mean log-ratios, then the products about them. One read would need sums about a guess: the weighted
products live at the likely tokens, where log-ratios are a hundred times smaller than their mean over the vocabulary, and
Σ w·x² + 2c·Σ w·x + c²·Σ w would lose four digits there.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels.launch import (
    FLOATING,
    Launch,
    LaunchConfig,
    check_device,
    check_matrix_shape,
    check_rows,
    check_vector,
    choose_config,
    fast_instructions,
    result_rows,
)
from popsd_kernels.logits import floor_logit, load_entries, load_logit, projection_stream, target_stream
from popsd_kernels.options import RowOptions
from popsd_kernels.primitives import LOG2E, LOGIT_FLOOR, NOTHING, lane_sum, lse_finish, lse_fold, lse_fold_sum
from popsd_kernels.target import Difference

MOMENTS = 13
_NAME = "row_moments"


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
) -> torch.Tensor:
    """Moments of Δ_total = log π_T − log π_θ, Δ_ref = log π_ref − log π_θ and Δ_it = log π_T − log π_ref per token.

    student, reference, and teacher or delta: [C, V] raw projections, float32, bfloat16 or float16, unit stride along V, any
        row stride; read only. With ``delta`` (teacher − reference) the teacher's logits are the reference's plus
        inv_temperature · delta_scale · delta. Biases: [V], contiguous; ``target_bias`` is teacher's and reference's.
    options: logit transforms, temperature and ``relative``, with which ``reference`` holds its difference to the student
        (and ``delta`` is needed); nothing else of it is used.
    masked: whether a logit may be −inf (or LOGIT_FLOOR). Such entries leave every sum; False saves looking for them.
    Returns [13, C] float32: ‖Δ_total‖², ‖Δ_ref‖², ‖Δ_it‖², Δ_total·Δ_ref, Δ_total·Δ_it of the log-ratios less their means
    over the vocabulary; the same five of the log-ratios themselves, each entry weighted by π_θ; mean Δ_total, mean Δ_ref;
    the number of entries. Raises ValueError, TypeError or RuntimeError before any launch. Not yet run on a GPU.
    """
    check_matrix_shape(_NAME, "student", student)
    check_device(_NAME, "student", student)
    (rows, vocabulary), device = student.shape, student.device
    matrices = {"student": student, "reference": reference, "teacher": teacher, "delta": delta}
    check_rows(_NAME, student.shape, device, matrices)
    check_vector(_NAME, "student_bias", student_bias, vocabulary, device, FLOATING)
    check_vector(_NAME, "target_bias", target_bias, vocabulary, device, FLOATING)
    if (teacher is None) == (delta is None):
        given = "both" if delta is not None else "neither"
        raise ValueError(f"{_NAME}: one of teacher and delta must be given, got {given}; leave the other out")
    if options.relative and delta is None:
        raise ValueError(
            f"{_NAME}: delta must be given where options.relative is True, got teacher; pass their difference"
        )
    out = result_rows(MOMENTS, rows, device)
    if rows:
        tensors = (student, reference, teacher, delta, student_bias, target_bias)
        fast = fast_instructions(device)
        softcap = options.target.softcap is not None
        key = (vocabulary, student.dtype, reference.dtype, teacher is None, masked, softcap, options.relative)
        config = choose_config(
            "moments", device, key, lambda trial: plan(*tensors, options, masked, out, trial, fast)
        )  # fmt: skip
        plan(*tensors, options, masked, out, config, fast).run(device)
    return out


def plan(
    student: torch.Tensor,
    reference: torch.Tensor,
    teacher: torch.Tensor | None,
    delta: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    target_bias: torch.Tensor | None,
    options: RowOptions,
    masked: bool,
    out: torch.Tensor,
    config: LaunchConfig,
    fast: bool,
) -> Launch:
    """The launch that `row_moments` makes, unchecked. out: [13, C] float32 from `result_rows`."""
    tau = float(options.inv_temperature)
    own = None if teacher is None else projection_stream(teacher, target_bias, options.target, tau)
    return Launch(
        row_moments_kernel,
        student.shape[0],
        {
            "student": projection_stream(student, student_bias, options.student, tau),
            "reference": target_stream(reference, target_bias, options),
            "teacher": own,
            "difference": None
            if delta is None
            else Difference(delta, delta.stride(0), float(options.delta_scale) * tau),
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "V": student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "MASKED": masked,
            "RELATIVE": options.relative,
            "FAST": fast,
        },
        config,
    )


class Products(NamedTuple):
    """Accumulators [BLOCK // VEC]: squares of total, induced and transferable, and total · transferable."""

    total: Any
    induced: Any
    transferable: Any
    with_transferable: Any


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
    RELATIVE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token, twice over the row."""
    row = tl.program_id(0)
    zero = tl.zeros([BLOCK // VEC], tl.float32)
    s_top, r_top, t_top = zero + NOTHING, zero + NOTHING, zero + NOTHING
    s_total, r_total, t_total = zero, zero, zero
    total_sum, induced_sum, missing = zero, zero, zero
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s, r, t, inside = _streams(student, reference, teacher, difference, row, columns, V, MASKED, RELATIVE, FAST)
        total_sum += lane_sum(tl.where(inside, _ratio(t, s, RELATIVE), 0.0), VEC)
        induced_sum += lane_sum(tl.where(inside, _ratio(r, s, RELATIVE), 0.0), VEC)
        missing += lane_sum(((columns < V) & (inside == 0)).to(tl.float32), VEC)
        s_top, s_total = lse_fold(s, s_top, s_total, VEC)
        if RELATIVE:
            r_top, r_total = lse_fold_sum(s, r, r_top, r_total, VEC, 1.0, 1.0)
            t_top, t_total = lse_fold_sum(s, t, t_top, t_total, VEC, 1.0, 1.0)
        else:
            r_top, r_total = lse_fold(r, r_top, r_total, VEC)
            t_top, t_total = lse_fold(t, t_top, t_total, VEC)
    s_max, s_logsum = lse_finish(s_top, s_total, V)
    r_max, r_logsum = lse_finish(r_top, r_total, V)
    t_max, t_logsum = lse_finish(t_top, t_total, V)
    count = V - tl.sum(missing, axis=0)
    total_mean = tl.sum(total_sum, axis=0) / count
    induced_mean = tl.sum(induced_sum, axis=0) / count
    a = total_mean - ((t_max - s_max) + (t_logsum - s_logsum))
    b = induced_mean - ((r_max - s_max) + (r_logsum - s_logsum))
    centred, weighted = Products(zero, zero, zero, zero), Products(zero, zero, zero, zero)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s, r, t, inside = _streams(student, reference, teacher, difference, row, columns, V, MASKED, RELATIVE, FAST)
        p = tl.where(inside, tl.exp2((s - s_max) * LOG2E - s_logsum * LOG2E), 0.0)
        x = tl.where(inside, _ratio(t, s, RELATIVE) - total_mean, 0.0)
        y = tl.where(inside, _ratio(r, s, RELATIVE) - induced_mean, 0.0)
        centred = _accumulate(centred, x, y, 1.0, VEC)
        weighted = _accumulate(weighted, x + a, y + b, p, VEC)
    out_ptr += row
    _store(out_ptr, centred, out_row_stride)
    _store(out_ptr + 5 * out_row_stride, weighted, out_row_stride)
    tl.store(out_ptr + 10 * out_row_stride, a)
    tl.store(out_ptr + 11 * out_row_stride, b)
    tl.store(out_ptr + 12 * out_row_stride, count)


@triton.jit
def _streams(
    student,
    reference,
    teacher,
    difference,
    row,
    columns,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    RELATIVE: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block's floored logits, reference and teacher less the student where RELATIVE, and which entries are possible in all
    three; 0 or LOGIT_FLOOR beyond the vocabulary."""
    s = floor_logit(load_logit(student, row, columns, V, True, FAST), columns, V, True)
    r, lowest = load_logit(reference, row, columns, V, True, FAST), s
    if not RELATIVE:
        r = floor_logit(r, columns, V, True)
        lowest = tl.minimum(s, r)
    if teacher is not None:
        t = floor_logit(load_logit(teacher, row, columns, V, True, FAST), columns, V, True)
        lowest = tl.minimum(lowest, t)
    else:
        delta = load_entries(difference.ptr, row, difference.row_stride, columns, V, True)
        t = r + delta * tl.cast(difference.gain, tl.float32)
    inside = columns < V
    if MASKED:  # whatever scale or temperature the floor went through
        inside = inside & (lowest > 1e-6 * LOGIT_FLOOR)
    return s, r, t, inside


@triton.jit
def _ratio(x, s, RELATIVE: tl.constexpr):
    """The log-ratio to the student but for the normalisers."""
    return x if RELATIVE else x - s


@triton.jit
def _accumulate(sums, x, y, weight, VEC: tl.constexpr):
    z = x - y
    wx, wz = weight * x, weight * z
    return Products(
        sums.total + lane_sum(wx * x, VEC),
        sums.induced + lane_sum(weight * y * y, VEC),
        sums.transferable + lane_sum(wz * z, VEC),
        sums.with_transferable + lane_sum(wx * z, VEC),
    )


@triton.jit
def _store(pointer, sums, stride):
    """Δ_total·Δ_ref is what Δ_total·Δ_it leaves of ‖Δ_total‖²."""
    total, with_transferable = tl.sum(sums.total, axis=0), tl.sum(sums.with_transferable, axis=0)
    tl.store(pointer, total)
    tl.store(pointer + stride, tl.sum(sums.induced, axis=0))
    tl.store(pointer + 2 * stride, tl.sum(sums.transferable, axis=0))
    tl.store(pointer + 3 * stride, total - with_transferable)
    tl.store(pointer + 4 * stride, with_transferable)
