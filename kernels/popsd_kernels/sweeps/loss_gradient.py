"""Sweep 2: per-token loss, KLs and entropies, and the gradient of the student's raw projections.

The gradient of an entry needs sums over the whole row (divergence.py), so the row is read twice: 8 bytes per entry for
the sums, 8 again for the gradient, 2 written in bfloat16. Forward KL without clips needs no such sum, so one read does. Where
the target is given as its difference to the student there are two reads: what rounding left of Σ(p − q), which is 0, is taken
out.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.checks import FLOAT32, check_output, check_rows, check_target, check_vector
from popsd_kernels.device.divergence import FORWARD, JENSEN_SHANNON, REVERSE, coefficient_of, mode_of
from popsd_kernels.device.logits import stream_gain
from popsd_kernels.device.operands import gradient_operand, optional, student_operand, target_operand
from popsd_kernels.device.probabilities import exact_logarithms, row_entries, row_scalars
from popsd_kernels.device.row_loss import (
    accumulate,
    finish_row,
    load_token_logit,
    store_block,
    store_gradient,
    zero_sums,
)
from popsd_kernels.launch import Launch, LaunchConfig, Outputs, fast_instructions, result_rows
from popsd_kernels.rows import RowLoss, RowOptions, Rows, RowStatistics

_NAME = "row_loss_gradient"


def row_loss_gradient(
    rows: Rows, statistics: RowStatistics, options: RowOptions, *, gradient: torch.Tensor | None = None
) -> RowLoss:
    """Sweep 2: per-token divergence (Eq. 12, 18), KLs, entropies; into ``gradient``, d divergence / d student raw projection.

    rows: those of sweep 1; where it composed the target, ``rows.with_target(target_out)``. Read only.
    statistics: what sweep 1 returned, four [C] float32.
    gradient: None (no gradient work), or [C, V] of any of the three dtypes, every entry of which is overwritten: times
        row_scale, through temperature, scale and soft cap, 0 where token_clip capped. It may be ``rows.student`` or
        ``rows.target`` itself (same memory, dtype size and row stride); ``token_logprob`` is then still the student's. It may
        also lie over what the target was composed of, which nothing reads any more.
    Returns nine [C] float32 tensors in nats. ``argmax_agreement`` is up to float32 rounding of the two largest logits. A NaN in
    a row makes its divergence, whatever follows from the stream that holds it, and its gradient NaN, clips or not; shares and
    flags (clip_fraction, token_clipped, argmax_agreement) count comparisons, which no NaN passes. Other rows are unmoved.
    Raises ValueError, TypeError or RuntimeError before any launch.

    >>> import torch
    >>> from popsd_kernels import RowOptions, Rows, row_loss_gradient, row_statistics
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU with TRITON_INTERPRET=1
    >>> student, target = torch.randn(2, 4, 1000, device=device)
    >>> rows, options = Rows(student, target=target), RowOptions(beta=0.0)
    >>> gradient = torch.empty_like(student)
    >>> loss = row_loss_gradient(rows, row_statistics(rows, options), options, gradient=gradient)
    >>> bool(torch.allclose(gradient, student.softmax(dim=1) - target.softmax(dim=1), atol=1e-6))
    True
    """
    check_rows(_NAME, rows, options)
    check_target(_NAME, rows, composed=False, finished=True)
    count, device = rows.student.shape[0], rows.student.device
    for name, tensor in zip(RowStatistics._fields, statistics, strict=True):
        check_vector(_NAME, f"statistics.{name}", tensor, count, device, FLOAT32)
    check_output(_NAME, "gradient", gradient, rows, replaceable=("student", "target"))
    results = result_rows(len(RowLoss._fields), count, device)
    if count:
        config, fast = launch.shipped_config(table_key(options), device), fast_instructions(device)
        plan(rows, statistics, options, Outputs(results, gradient), config, fast).run(device)
    return RowLoss(*results)


def table_key(options: RowOptions) -> str:
    """This sweep's row in launch.TABLES."""
    return "loss_gradient" if options.entry_clip is None else "loss_gradient_entry_clip"


def plan(
    rows: Rows, statistics: RowStatistics, options: RowOptions, outputs: Outputs, config: LaunchConfig, fast: bool
) -> Launch:
    """The launch that `row_loss_gradient` makes, unchecked. outputs: [9, C], and the gradient."""
    results, gradient = outputs
    return Launch(
        row_loss_gradient_kernel,
        rows.student.shape[0],
        {
            "student": student_operand(rows, options),
            "target": target_operand(rows, options),
            "statistics": tuple(statistics),
            "token_ids_ptr": rows.token_ids,
            "row_scale_ptr": rows.row_scale,
            "gradient": gradient_operand(gradient),
            "out_ptr": results,
            "out_row_stride": results.stride(0),
            "beta": coefficient_of(options),
            "entry_clip": optional(options.entry_clip),
            "token_clip": optional(options.token_clip),
            "V": rows.student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "MODE": mode_of(options),
            "MINUS_STUDENT": options.minus_student,
            "FAST": fast,
        },
        config,
    )


@triton.jit(
    do_not_specialize=["out_row_stride"],
    do_not_specialize_on_alignment=["statistics", "token_ids_ptr", "row_scale_ptr"],
)
def row_loss_gradient_kernel(
    student,
    target,
    statistics,
    token_ids_ptr,
    row_scale_ptr,
    gradient,
    out_ptr,
    out_row_stride,
    beta,
    entry_clip,
    token_clip,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    MODE: tl.constexpr,
    MINUS_STUDENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token: once over the row for the sums, then once more for the gradient unless ``one_read``."""
    row = tl.program_id(0)
    beta = tl.cast(beta, tl.float32)
    scalars = row_scalars(statistics, row, stream_gain(student) if target.gain is None else None)
    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    unclipped: tl.constexpr = entry_clip is None and token_clip is None
    one_read: tl.constexpr = MODE == FORWARD and not MINUS_STUDENT and unclipped and gradient is not None
    width: tl.constexpr = None if one_read else VEC  # one_read: 21.9 instructions per entry would become 22.9
    light: tl.constexpr = (MODE == REVERSE) | (MODE == JENSEN_SHANNON)
    unroll: tl.constexpr = 2 if light and entry_clip is None else 1  # the others would spill
    exact: tl.constexpr = exact_logarithms(MODE, entry_clip)
    token_logit = None
    if one_read and token_ids_ptr is not None:  # the gradient, stored from here on, may lie over the student's rows
        token_logit = load_token_logit(student, token_ids_ptr, row, V, FAST)
        tl.debug_barrier()
    sums = zero_sums(BLOCK // VEC)
    full: tl.constexpr = V // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK, loop_unroll_factor=unroll):
        columns = start + tl.arange(0, BLOCK)
        entries = row_entries(student, target, scalars, row, columns, V, False, FAST, exact, MINUS_STUDENT)
        sums = accumulate(sums, entries, beta, entry_clip, VEC, MODE, FAST, MINUS_STUDENT)
        if one_read:
            store_gradient(
                gradient, student, entries, None, row_scale, beta, None, row, columns, V, MODE, False, FAST
            )  # fmt: skip
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        entries = row_entries(student, target, scalars, row, columns, V, True, FAST, exact, MINUS_STUDENT)
        sums = accumulate(sums, entries, beta, entry_clip, VEC, MODE, FAST, MINUS_STUDENT)
        if one_read:
            store_gradient(
                gradient, student, entries, None, row_scale, beta, None, row, columns, V, MODE, True, FAST
            )  # fmt: skip
    slope_sum, row_scale = finish_row(
        sums, student, scalars, token_ids_ptr, out_ptr, out_row_stride, row, row_scale, beta, entry_clip, token_clip,
        V, MODE, FAST, MINUS_STUDENT, token_logit,
    )  # fmt: skip
    if gradient is not None:
        tl.debug_barrier()  # other threads may still store this row's own gradient, or read the token's logit from under it
        if row_scale == 0.0:
            for start in range(0, V, BLOCK):
                store_block(gradient, row, start + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32), V, True, width)
        elif not one_read:
            for start in tl.range(0, full, BLOCK, loop_unroll_factor=2):
                columns = start + tl.arange(0, BLOCK)
                entries = row_entries(student, target, scalars, row, columns, V, False, FAST, exact, MINUS_STUDENT)
                store_gradient(
                    gradient, student, entries, slope_sum, row_scale, beta, entry_clip, row, columns,
                    V, MODE, False, FAST, width,
                )  # fmt: skip
            if full < V:
                columns = full + tl.arange(0, BLOCK)
                entries = row_entries(student, target, scalars, row, columns, V, True, FAST, exact, MINUS_STUDENT)
                store_gradient(
                    gradient, student, entries, slope_sum, row_scale, beta, entry_clip, row, columns,
                    V, MODE, True, FAST, width,
                )  # fmt: skip
