"""Teacher minus reference logits where the two must be projected apart: soft caps, separate logits (Eq. 13, 14)."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels.launch import (
    FLOATING,
    Launch,
    LaunchConfig,
    check_device,
    check_matrix_shape,
    check_no_reinterpretation,
    check_rows,
    check_vector,
    choose_config,
    fast_instructions,
    result_rows,
)
from popsd_kernels.logits import load_logit, projection_stream
from popsd_kernels.options import RowOptions
from popsd_kernels.primitives import LOGIT_FLOOR, NOTHING, lane_sum, lse_finish, lse_fold


def logit_difference(
    teacher: torch.Tensor,
    reference: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    options: RowOptions,
    center: bool,
) -> torch.Tensor:
    """out = cap(scale * (teacher + bias)) - cap(scale * (reference + bias)), untempered; returns its offset [C].

    teacher, reference: [C, V] raw projections, float32, bfloat16 or float16, unit stride along V. bias: [V].
    out: [C, V] float32, may be ``teacher`` or ``reference`` itself. ``options.target`` has scale and soft cap.
    The offset is float32 and tempered, for `row_statistics` with ``delta_scale=1``: inv_temperature times the mean of
    out (center, Eq. 14), or the difference of the two log-sum-exps of the tempered logits.
    Where teacher or reference is -inf (or LOGIT_FLOOR) there is no difference: such entries leave the mean, and ``out``
    gets offset / inv_temperature there, so that the centred difference is 0 as the oracle has it.
    Raises ValueError, TypeError or RuntimeError before any launch.
    """
    check_matrix_shape("logit_difference", "teacher", teacher)
    check_device("logit_difference", "teacher", teacher)
    (rows, vocabulary), device = teacher.shape, teacher.device
    check_rows(
        "logit_difference", teacher.shape, device, {"teacher": teacher, "reference": reference, "out": out}
    )  # fmt: skip
    check_vector("logit_difference", "bias", bias, vocabulary, device, FLOATING)
    if out.dtype != torch.float32:
        raise TypeError(f"logit_difference: out must be torch.float32, got {out.dtype}; a difference cancels")
    check_no_reinterpretation("logit_difference", "out", out, teacher=teacher, reference=reference)
    offset = result_rows(1, rows, device)[0]
    if rows == 0:
        return offset
    fast = fast_instructions(device)
    config = choose_config(
        "difference",
        device,
        (vocabulary, teacher.dtype, reference.dtype, options.target.softcap is None, center),
        lambda trial: plan(teacher, reference, torch.empty_like(out), bias, options, center, offset, trial, fast),
    )
    plan(teacher, reference, out, bias, options, center, offset, config, fast).run(device)
    return offset


def plan(
    teacher: torch.Tensor,
    reference: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    options: RowOptions,
    center: bool,
    offset: torch.Tensor,
    config: LaunchConfig,
    fast: bool,
) -> Launch:
    """The launch that `logit_difference` makes, unchecked."""
    return Launch(
        logit_difference_kernel,
        teacher.shape[0],
        {
            "teacher": projection_stream(teacher, bias, options.target, 1.0),
            "reference": projection_stream(reference, bias, options.target, 1.0),
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "offset_ptr": offset,
            "inv_temperature": float(options.inv_temperature),
            "V": teacher.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "CENTER": center,
            "FAST": fast,
        },
        config,
    )


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
    loop that only rows with such entries run."""
    row = tl.program_id(0)
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    out_ptr += row.to(tl.int64) * out_row_stride
    total = tl.zeros([BLOCK // VEC], tl.float32)
    missing = tl.zeros([BLOCK // VEC], tl.float32)
    teacher_top = tl.full([BLOCK // VEC], NOTHING, tl.float32)
    reference_top = tl.full([BLOCK // VEC], NOTHING, tl.float32)
    teacher_total = tl.zeros([BLOCK // VEC], tl.float32)
    reference_total = tl.zeros([BLOCK // VEC], tl.float32)
    # Masked throughout: off the fast path, and a compare per vector is cheap beside 12 bytes per entry.
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z_teacher = load_logit(teacher, row, columns, V, True, FAST)
        z_reference = load_logit(reference, row, columns, V, True, FAST)
        floor = 0.5 * LOGIT_FLOOR * tl.minimum(tl.cast(teacher.gain, tl.float32), 1.0)
        absent = (z_teacher <= floor) | (z_reference <= floor)
        difference = tl.where(absent, 0.0, z_teacher - z_reference)
        tl.store(out_ptr + columns, tl.where(absent, LOGIT_FLOOR, difference), mask=inside)
        total += lane_sum(tl.where(inside, difference, 0.0), VEC)
        missing += lane_sum((absent & inside).to(tl.float32), VEC)
        if not CENTER:
            z_teacher = tl.where(inside, z_teacher, float("-inf"))
            z_reference = tl.where(inside, z_reference, float("-inf"))
            teacher_top, teacher_total = lse_fold(z_teacher, teacher_top, teacher_total, VEC, inv_temperature)
            reference_top, reference_total = lse_fold(z_reference, reference_top, reference_total, VEC, inv_temperature)
    missing_count = tl.sum(missing, axis=0)
    if CENTER:
        fill = tl.sum(total, axis=0) / tl.maximum(V - missing_count, 1.0)
        tl.store(offset_ptr + row, fill * inv_temperature)
    else:
        teacher_max, teacher_logsum = lse_finish(teacher_top, teacher_total, V, inv_temperature)
        reference_max, reference_logsum = lse_finish(reference_top, reference_total, V, inv_temperature)
        offset = (teacher_max - reference_max) + (teacher_logsum - reference_logsum)
        tl.store(offset_ptr + row, offset)
        fill = offset / inv_temperature
    if missing_count > 0.0:
        tl.debug_barrier()  # the marks below may have been stored by other threads
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            marked = tl.load(out_ptr + columns, mask=columns < V, other=0.0)
            tl.store(out_ptr + columns, tl.where(marked <= LOGIT_FLOOR, fill, marked), mask=columns < V)
