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
from popsd_kernels.checks import FLOAT32, check_output, check_rows, check_target, composing
from popsd_kernels.device.logits import load_scaled, stream_gain
from popsd_kernels.device.operands import (
    composing_operand,
    composition,
    offset_operand,
    student_operand,
    target_operand,
)
from popsd_kernels.device.primitives import NOTHING, lse_accumulate, lse_accumulate_sum, lse_finish
from popsd_kernels.device.targets import load_offset, load_target_logit, target_gain
from popsd_kernels.launch import Launch, LaunchConfig, Outputs, fast_instructions, result_rows
from popsd_kernels.rows import RowOptions, Rows, RowStatistics

_NAME = "row_statistics"


def row_statistics(rows: Rows, options: RowOptions, *, target_out: torch.Tensor | None = None) -> RowStatistics:
    """Sweep 1: (max, log-sum) of student and target per token and, where it is composed, the target's logits (Eq. 13-17).

    rows: raw projections; read only, but for the aliasing below. token_ids and row_scale are not used.
    target_out: [C, V] float32, needed exactly where the target is composed: base + clip(difference) / pmi_beta, tempered,
        floored at LOGIT_FLOOR; less the student where ``options.minus_student``. Or what ``rows.composed.function`` makes. It
        may be ``rows.base``, ``rows.difference`` or, with ``rows.composed``, ``rows.teacher`` or ``rows.reference`` itself.
    Returns four [C] float32 tensors in nats. A NaN anywhere in a row makes that row's normalisers NaN.
    Raises ValueError, TypeError or RuntimeError before any launch. Rows that start at multiples of 16 bytes load as 128-bit
    vectors.

    >>> import torch
    >>> from popsd_kernels import RowOptions, Rows, row_loss_gradient, row_statistics
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU with TRITON_INTERPRET=1
    >>> student, base, difference = torch.randn(3, 4, 1000, device=device)
    >>> rows = Rows(student, base=base, difference=difference, offset=difference.mean(dim=1))
    >>> statistics = row_statistics(rows, RowOptions(), target_out=difference)
    >>> log_p = student - (statistics.student_max + statistics.student_logsum)[:, None]
    >>> bool(torch.allclose(log_p, student.log_softmax(dim=1), atol=1e-5))
    True
    >>> loss = row_loss_gradient(rows.with_target(difference), statistics, RowOptions())
    """
    check_rows(_NAME, rows, options)
    check_target(_NAME, rows, finished=not options.minus_student)
    check_output(
        _NAME, "target_out", target_out, rows, dtypes=FLOAT32, replaceable=composing(rows), untouchable=("student",)
    )  # fmt: skip
    composed = "rows.difference" if rows.composed is None else "rows.composed"
    if (rows.difference is None and rows.composed is None) != (target_out is None):
        given = composed if target_out is None else "target_out"
        raise ValueError(
            f"{_NAME}: {composed} and target_out must be given together, got {given} alone; a composed target needs a "
            "place for its logits, rows.target needs none"
        )
    count, device = rows.student.shape[0], rows.student.device
    results = result_rows(len(RowStatistics._fields), count, device)
    if count:
        config = launch.shipped_config("statistics", device)
        plan(rows, options, Outputs(results, target_out), config, fast_instructions(device)).run(device)
    return RowStatistics(*results)


def plan(rows: Rows, options: RowOptions, outputs: Outputs, config: LaunchConfig, fast: bool) -> Launch:
    """The launch that `row_statistics` makes, unchecked. outputs: [4, C], and ``target_out``."""
    results, target_out = outputs
    return Launch(
        row_statistics_kernel,
        rows.student.shape[0],
        {
            "student": student_operand(rows, options),
            "target": target_operand(rows, options),
            "difference": composing_operand(rows, options),
            "offset_ptr": offset_operand(rows),
            "target_out_ptr": target_out,
            "target_out_row_stride": None if target_out is None else target_out.stride(0),
            "composition": composition(rows, options),
            "out_ptr": results,
            "out_row_stride": results.stride(0),
            "V": rows.student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "MINUS_STUDENT": options.minus_student,
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
    composition,
    out_ptr,
    out_row_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    MINUS_STUDENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token. Full blocks run unmasked; a vocabulary that BLOCK does not divide has one masked tail."""
    row = tl.program_id(0)
    student_top = tl.full([BLOCK // VEC], NOTHING, tl.float32)
    target_top = tl.full([BLOCK // VEC], NOTHING, tl.float32)
    student_total = tl.zeros([BLOCK // VEC], tl.float32)
    target_total = tl.zeros([BLOCK // VEC], tl.float32)
    s_gain, u_gain = 1.0, 1.0
    if difference is not None or target.gain is None:
        s_gain, u_gain = stream_gain(student), target_gain(target, difference)
    offset = 0.0
    if difference is not None:
        offset = load_offset(offset_ptr, row, composition)
    full: tl.constexpr = V // BLOCK * BLOCK
    # 22 to 18 instructions per entry: addresses, counters. A device function would take 225 registers (soft cap, bias, bf16).
    unroll: tl.constexpr = 8 if composition.function is None else 2
    for start in tl.range(0, full, BLOCK, loop_unroll_factor=unroll):
        s, u = _logits(
            student, target, difference, offset, target_out_ptr, target_out_row_stride, composition,
            row, start + tl.arange(0, BLOCK), V, False, FAST,
        )  # fmt: skip
        student_top, student_total = lse_accumulate(s, student_top, student_total, VEC, s_gain)
        if MINUS_STUDENT:
            target_top, target_total = lse_accumulate_sum(s, u, target_top, target_total, VEC, s_gain, u_gain)
        else:
            target_top, target_total = lse_accumulate(u, target_top, target_total, VEC, u_gain)
    if full < V:
        s, u = _logits(
            student, target, difference, offset, target_out_ptr, target_out_row_stride, composition,
            row, full + tl.arange(0, BLOCK), V, True, FAST,
        )  # fmt: skip
        student_top, student_total = lse_accumulate(s, student_top, student_total, VEC, s_gain)
        if MINUS_STUDENT:
            target_top, target_total = lse_accumulate_sum(s, u, target_top, target_total, VEC, s_gain, u_gain)
        else:
            target_top, target_total = lse_accumulate(u, target_top, target_total, VEC, u_gain)
    student_max, student_logsum = lse_finish(student_top, student_total, V, s_gain)
    target_max, target_logsum = lse_finish(target_top, target_total, V, 1.0 if MINUS_STUDENT else u_gain)
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
    composition,
    row,
    columns,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block of student and target logits but for their gains, -inf beyond the vocabulary; a composed target is stored.

    Two distributions are rounded as sweep 2 rounds them: exact products would make p's sum 1 + 2e-3 at logits of 5e4.
    """
    s = load_scaled(student, row, columns, V, MASKED, FAST)
    u = load_target_logit(target, difference, offset, composition, row, columns, V, MASKED, FAST)
    if difference is not None:
        pointers = target_out_ptr + row.to(tl.int64) * target_out_row_stride + columns
        if MASKED:
            tl.store(pointers, u, mask=columns < V)
        else:
            tl.store(pointers, u)
    elif target.gain is not None:
        s, u = s * stream_gain(student), u * stream_gain(target)
    if MASKED:
        s = tl.where(columns < V, s, float("-inf"))
        u = tl.where(columns < V, u, float("-inf"))
    return s, u
