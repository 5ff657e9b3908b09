"""Teacher minus reference logits where the two must be projected apart: soft caps, separate logits (Eq. 13, 14)."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.checks import FLOAT32, check_not_minus_student, check_output, check_rows
from popsd_kernels.device.logits import load_logit
from popsd_kernels.device.operands import frozen_operand
from popsd_kernels.device.primitives import LOGIT_FLOOR, NOTHING, lane_sum, lse_accumulate, lse_finish
from popsd_kernels.launch import Launch, LaunchConfig, Outputs, fast_instructions, result_rows
from popsd_kernels.rows import RowOptions, Rows

_NAME = "logit_difference"


def logit_difference(rows: Rows, options: RowOptions, *, center: bool, out: torch.Tensor) -> torch.Tensor:
    """out = cap(scale * (teacher + bias)) - cap(scale * (reference + bias)), untempered; returns its offset [C].

    rows: teacher and reference, read only but for the aliasing below; ``rows.frozen_bias`` is the bias, ``options.target`` has
        scale and soft cap. Of the student only the shape counts.
    out: [C, V] float32, may be ``rows.teacher`` or ``rows.reference`` itself. ``rows._replace(difference=out, offset=offset)``
        is then what `row_statistics` composes a target of, with ``delta_scale=1``.
    The offset is float32 and tempered: inv_temperature times the mean of out (center, Eq. 14), or the difference of the two
    log-sum-exps of the tempered logits. Where teacher or reference is -inf (or LOGIT_FLOOR) there is no difference: such
    entries leave the mean, and ``out`` gets offset / inv_temperature there, so that the centred difference is 0.
    Raises ValueError, TypeError or RuntimeError before any launch.
    """
    check_rows(_NAME, rows, options, needed=("teacher", "reference"))
    check_not_minus_student(_NAME, options)
    check_output(_NAME, "out", out, rows, dtypes=FLOAT32, replaceable=("teacher", "reference"))
    tokens, device = rows.student.shape[0], rows.student.device
    offset = result_rows(1, tokens, device)
    if tokens:
        config, fast = launch.shipped_config("difference", device), fast_instructions(device)
        plan(rows, options, center, Outputs(offset, out), config, fast).run(device)
    return offset[0]


def plan(rows: Rows, options: RowOptions, center: bool, outputs: Outputs, config: LaunchConfig, fast: bool) -> Launch:
    """The launch that `logit_difference` makes, unchecked. outputs: the offset [1, C], and ``out``."""
    offset, out = outputs
    assert rows.teacher is not None and rows.reference is not None and out is not None
    untempered = replace(options, inv_temperature=1.0)
    return Launch(
        logit_difference_kernel,
        rows.student.shape[0],
        {
            "teacher": frozen_operand(rows.teacher, rows, untempered),
            "reference": frozen_operand(rows.reference, rows, untempered),
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "offset_ptr": offset,
            "inv_temperature": float(options.inv_temperature),
            "V": rows.student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "CENTER": center,
            "FAST": fast,
        },
        config,
    )


class Sums(NamedTuple):
    """Accumulators of a row [BLOCK // VEC]: differences, entries without one, and two online log-sum-exps."""

    total: Any
    missing: Any
    teacher_top: Any
    teacher_total: Any
    reference_top: Any
    reference_total: Any


@triton.jit
def logit_difference_kernel(
    teacher,
    reference,
    out_ptr,
    out_row_stride,
    offset_ptr,
    inv_temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    CENTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token. Entries without a difference are marked, and filled in once the offset is known: a second
    loop that only rows with such entries run. Full blocks run unmasked, the vocabulary's tail is a block of its own."""
    row, full = tl.program_id(0), V // BLOCK * BLOCK
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    out_ptr += row.to(tl.int64) * out_row_stride
    zero = tl.zeros([BLOCK // VEC], tl.float32)
    sums = Sums(zero, zero, zero + NOTHING, zero, zero + NOTHING, zero)
    for start in range(0, full, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        sums = _block(
            sums, teacher, reference, out_ptr, inv_temperature, row, columns, V, VEC, CENTER, False, FAST
        )  # fmt: skip
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        sums = _block(sums, teacher, reference, out_ptr, inv_temperature, row, columns, V, VEC, CENTER, True, FAST)
    missing_count = tl.sum(sums.missing, axis=0)
    if CENTER:
        fill = tl.sum(sums.total, axis=0) / tl.where(missing_count < V, V - missing_count, 1.0)
        tl.store(offset_ptr + row, fill * inv_temperature)
    else:
        teacher_max, teacher_logsum = lse_finish(sums.teacher_top, sums.teacher_total, V, inv_temperature)
        reference_max, reference_logsum = lse_finish(sums.reference_top, sums.reference_total, V, inv_temperature)
        offset = (teacher_max - reference_max) + (teacher_logsum - reference_logsum)
        tl.store(offset_ptr + row, offset)
        fill = offset / inv_temperature
    if missing_count > 0.0:
        tl.debug_barrier()  # the marks below may have been stored by other threads
        for start in range(0, full, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            marked = tl.load(out_ptr + columns)
            tl.store(out_ptr + columns, tl.where(marked <= LOGIT_FLOOR, fill, marked))
        if full < V:
            columns = full + tl.arange(0, BLOCK)
            marked = tl.load(out_ptr + columns, mask=columns < V, other=0.0)
            tl.store(out_ptr + columns, tl.where(marked <= LOGIT_FLOOR, fill, marked), mask=columns < V)


@triton.jit
def _block(
    sums,
    teacher,
    reference,
    out_ptr,
    inv_temperature,
    row,
    columns,
    V: tl.constexpr,
    VEC: tl.constexpr,
    CENTER: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Stores a block's differences, LOGIT_FLOOR where there is none, and adds it to the sums."""
    z_teacher = load_logit(teacher, row, columns, V, MASKED, FAST)
    z_reference = load_logit(reference, row, columns, V, MASKED, FAST)
    # below NOTHING whatever scale a floor went through; a NaN beside a -inf is a NaN, not a missing entry
    absent = tl.minimum(z_teacher, z_reference, propagate_nan=tl.PropagateNan.ALL) <= NOTHING
    difference = tl.where(absent, 0.0, z_teacher - z_reference)
    marked = tl.where(absent, LOGIT_FLOOR, difference)
    if MASKED:
        inside = columns < V
        tl.store(out_ptr + columns, marked, mask=inside)
        difference, absent = tl.where(inside, difference, 0.0), absent & inside
        z_teacher, z_reference = (
            tl.where(inside, z_teacher, float("-inf")),
            tl.where(inside, z_reference, float("-inf")),
        )
    else:
        tl.store(out_ptr + columns, marked)
    total, missing = sums.total + lane_sum(difference, VEC), sums.missing + lane_sum(absent.to(tl.float32), VEC)
    teacher_top, teacher_total = sums.teacher_top, sums.teacher_total
    reference_top, reference_total = sums.reference_top, sums.reference_total
    if not CENTER:
        teacher_top, teacher_total = lse_accumulate(z_teacher, teacher_top, teacher_total, VEC, inv_temperature)
        reference_top, reference_total = lse_accumulate(
            z_reference, reference_top, reference_total, VEC, inv_temperature
        )
    return Sums(total, missing, teacher_top, teacher_total, reference_top, reference_total)
