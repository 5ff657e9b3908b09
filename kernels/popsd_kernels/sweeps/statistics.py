"""Sweep 1: normalisers of student and target in one pass, the target composed on the fly.

Per vocabulary entry: read student, base and difference (12 bytes in float32), write the target's logit (4 bytes) so
that sweep 2 need not compose it again.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.checks import (
    FLOATING,
    check_device,
    check_matrix_shape,
    check_no_reinterpretation,
    check_rows,
    check_vector,
)
from popsd_kernels.device.logits import load_scaled, projection_stream, stream_gain, target_stream
from popsd_kernels.device.primitives import NOTHING, lse_finish, lse_fold, lse_fold_sum
from popsd_kernels.device.targets import Difference, load_target_logit, target_gain
from popsd_kernels.launch import Launch, LaunchConfig, fast_instructions, result_rows
from popsd_kernels.rows import RowOptions, RowStatistics


def row_statistics(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None = None,
    delta_offset: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
    options: RowOptions,
    target_out: torch.Tensor | None = None,
) -> RowStatistics:
    """(max, log-sum) of student and target per token, and with ``delta`` the purified target's logits (Eq. 13-17).

    student, target: [C, V] raw projections, float32, bfloat16 or float16, unit stride along V, any row stride; read
        only, but for the aliasing below. Biases: [V], contiguous, any of those dtypes.
    delta: None, and ``target`` is the target; or [C, V] raw teacher - reference projections, and ``target`` is the base
        policy. delta_offset: [C] float32, subtracted from inv_temperature * delta_scale * delta.
    target_out: with ``delta`` only, [C, V] float32: base + clip(...) / pmi_beta, tempered, floored at LOGIT_FLOOR; less the
        student where ``options.relative``. May be ``target`` or ``delta`` itself (same dtype and strides).
    Returns four [C] float32 tensors in nats. A NaN anywhere in a row makes that row's normalisers NaN.
    Raises ValueError, TypeError or RuntimeError before any launch. Rows that start at multiples of 16 bytes load as 128-bit
    vectors.
    """
    check_matrix_shape("row_statistics", "student", student)
    check_device("row_statistics", "student", student)
    (rows, vocabulary), device = student.shape, student.device
    check_rows("row_statistics", student.shape, device, {"student": student, "target": target, "delta": delta})
    check_rows("row_statistics", student.shape, device, {"target_out": target_out})
    check_vector("row_statistics", "student_bias", student_bias, vocabulary, device, FLOATING)
    check_vector("row_statistics", "target_bias", target_bias, vocabulary, device, FLOATING)
    check_vector("row_statistics", "delta_offset", delta_offset, rows, device, (torch.float32,))
    if (delta is None) != (delta_offset is None) or (delta is None) != (target_out is None):
        given = [delta is not None, delta_offset is not None, target_out is not None]
        raise ValueError(
            f"row_statistics: delta, delta_offset and target_out must be given together or not at all, got {given}; "
            "for two distributions leave all three out"
        )
    if target_out is not None and target_out.dtype != torch.float32:
        raise TypeError(f"row_statistics: target_out must be torch.float32, got {target_out.dtype}; logits need it")
    if target_out is not None and rows and target_out.data_ptr() == student.data_ptr():
        raise ValueError("row_statistics: target_out must not be student, which sweep 2 reads; use target or delta")
    check_no_reinterpretation("row_statistics", "target_out", target_out, target=target, delta=delta)
    out = result_rows(4, rows, device)
    if rows == 0:
        return RowStatistics(*out)
    tensors = (student, target, delta, delta_offset, student_bias, target_bias)
    config = launch.shipped_config("statistics", device)
    plan(*tensors, options, target_out, out, config, fast_instructions(device)).run(device)
    return RowStatistics(*out)


def plan(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None,
    delta_offset: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    target_bias: torch.Tensor | None,
    options: RowOptions,
    target_out: torch.Tensor | None,
    out: torch.Tensor,
    config: LaunchConfig,
    fast: bool,
) -> Launch:
    """The launch that `row_statistics` makes, unchecked. out: [4, C] float32 from `result_rows`."""
    inv_temperature = float(options.inv_temperature)
    difference = None
    if delta is not None:
        difference = Difference(delta, delta.stride(0), float(options.delta_scale) * inv_temperature)
    return Launch(
        row_statistics_kernel,
        student.shape[0],
        {
            "student": projection_stream(student, student_bias, options.student, inv_temperature),
            "target": target_stream(target, target_bias, options),
            "difference": difference,
            "offset_ptr": delta_offset,
            "target_out_ptr": target_out,
            "target_out_row_stride": None if target_out is None else target_out.stride(0),
            "pmi_beta": None if delta is None else float(options.pmi_beta),
            "pmi_clip": None if delta is None or options.pmi_clip is None else float(options.pmi_clip),
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "V": student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "RELATIVE": options.relative,
            "FAST": fast,
        },
        config,
    )


@triton.jit(do_not_specialize=["out_row_stride"], do_not_specialize_on_alignment=["offset_ptr"])
def row_statistics_kernel(
    student,
    target,
    difference,
    offset_ptr,
    target_out_ptr,
    target_out_row_stride,
    pmi_beta,
    pmi_clip,
    out_ptr,
    out_row_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    RELATIVE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token. Full blocks run unmasked; a vocabulary that BLOCK does not divide has one masked tail."""
    row = tl.program_id(0)
    student_top = tl.full([BLOCK // VEC], NOTHING, tl.float32)
    target_top = tl.full([BLOCK // VEC], NOTHING, tl.float32)
    student_total = tl.zeros([BLOCK // VEC], tl.float32)
    target_total = tl.zeros([BLOCK // VEC], tl.float32)
    s_gain, u_gain = stream_gain(student), target_gain(target, difference)
    offset = 0.0
    if difference is not None:
        offset = tl.load(offset_ptr + row)
    full: tl.constexpr = V // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK, loop_unroll_factor=8):  # 22 to 18 instructions per entry: addresses, counters
        s, u = _logits(
            student, target, difference, offset, target_out_ptr, target_out_row_stride, pmi_beta, pmi_clip,
            row, start + tl.arange(0, BLOCK), V, False, FAST,
        )  # fmt: skip
        student_top, student_total = lse_fold(s, student_top, student_total, VEC, s_gain)
        if RELATIVE:
            target_top, target_total = lse_fold_sum(s, u, target_top, target_total, VEC, s_gain, u_gain)
        else:
            target_top, target_total = lse_fold(u, target_top, target_total, VEC, u_gain)
    if full < V:
        s, u = _logits(
            student, target, difference, offset, target_out_ptr, target_out_row_stride, pmi_beta, pmi_clip,
            row, full + tl.arange(0, BLOCK), V, True, FAST,
        )  # fmt: skip
        student_top, student_total = lse_fold(s, student_top, student_total, VEC, s_gain)
        if RELATIVE:
            target_top, target_total = lse_fold_sum(s, u, target_top, target_total, VEC, s_gain, u_gain)
        else:
            target_top, target_total = lse_fold(u, target_top, target_total, VEC, u_gain)
    student_max, student_logsum = lse_finish(student_top, student_total, V, s_gain)
    target_max, target_logsum = lse_finish(target_top, target_total, V, 1.0 if RELATIVE else u_gain)
    tl.store(out_ptr + row, student_max)
    tl.store(out_ptr + out_row_stride + row, student_logsum)
    tl.store(out_ptr + 2 * out_row_stride + row, target_max)
    tl.store(out_ptr + 3 * out_row_stride + row, target_logsum)


@triton.jit
def _logits(
    student,
    target,
    difference,
    offset,
    target_out_ptr,
    target_out_row_stride,
    pmi_beta,
    pmi_clip,
    row,
    columns,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block of student and target logits but for their gains, -inf beyond the vocabulary; a composed target is stored."""
    s = load_scaled(student, row, columns, V, MASKED, FAST)
    u = load_target_logit(target, difference, offset, pmi_beta, pmi_clip, row, columns, V, MASKED, FAST)
    if difference is not None:
        pointers = target_out_ptr + row.to(tl.int64) * target_out_row_stride + columns
        if MASKED:
            tl.store(pointers, u, mask=columns < V)
        else:
            tl.store(pointers, u)
    if MASKED:
        s = tl.where(columns < V, s, float("-inf"))
        u = tl.where(columns < V, u, float("-inf"))
    return s, u
