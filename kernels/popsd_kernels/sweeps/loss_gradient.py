"""Sweep 2: per-token loss and telemetry, and the gradient of the student's raw projections.

The gradient of an entry needs sums over the whole row (divergence.py), so the row is read twice: 8 bytes per entry for
the sums, 8 again for the gradient, 2 written in bfloat16. Forward KL without clipping needs no such sum: one read, but where
the target is relative to the student and rounding is all that is left to be wrong, Σ(p − q), which should be 0, is taken out.
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
from popsd_kernels.device.divergence import FORWARD, JENSEN_SHANNON, REVERSE, divergence_mode, kernel_beta
from popsd_kernels.device.logits import logit_stream, projection_stream, target_stream
from popsd_kernels.device.probabilities import exact_logarithms, row_entries, row_scalars
from popsd_kernels.device.row_loss import (
    Gradient,
    accumulate,
    finish_row,
    load_token_logit,
    store_block,
    store_gradient,
    zero_sums,
)
from popsd_kernels.launch import Launch, LaunchConfig, fast_instructions, result_rows
from popsd_kernels.rows import RowLoss, RowOptions, RowStatistics


def row_loss_gradient(
    student: torch.Tensor,
    target: torch.Tensor,
    statistics: RowStatistics,
    *,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
    options: RowOptions,
    purified: bool,
    token_ids: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
) -> RowLoss:
    """Per-token divergence (Eq. 12, 18) and telemetry; into ``gradient``, d divergence / d student raw projection.

    student: [C, V] raw projections as in sweep 1. target: [C, V]; with ``purified`` the logits that sweep 1 left in
        ``target_out``, else raw projections. Both float32, bfloat16 or float16, unit stride along V; read only.
    statistics: sweep 1's, four [C] float32. Biases: [V], contiguous.
    token_ids: [C] int64, the sampled tokens; an id outside [0, V) gives NaN. row_scale: [C] float32 multiplies the
        gradient only; where it is 0 the gradient row is exactly 0, whatever the row holds.
    gradient: None (no gradient work), or [C, V] of any of the three dtypes, every entry of which is overwritten: times
        row_scale, through temperature, scale and soft cap, 0 where token_clip capped. It may take the difference
        logits' memory as another dtype (they are no longer read), but not the student's or target's unless the element
        size and the row stride are the same; ``token_logprob`` is then still the student's.
    Returns nine [C] float32 tensors in nats. ``argmax_agreement`` is up to float32 rounding of the two largest logits. A NaN in
    a row makes its divergence, whatever follows from the stream that holds it, and its gradient NaN, clips or not; shares and
    flags (clip_fraction, token_clipped, argmax_agreement) count comparisons, which no NaN passes. Other rows are unmoved.
    Raises ValueError, TypeError or RuntimeError before any launch.
    """
    check_matrix_shape("row_loss_gradient", "student", student)
    check_device("row_loss_gradient", "student", student)
    (rows, vocabulary), device = student.shape, student.device
    check_rows("row_loss_gradient", student.shape, device, {"student": student, "target": target, "gradient": gradient})
    check_vector("row_loss_gradient", "student_bias", student_bias, vocabulary, device, FLOATING)
    check_vector("row_loss_gradient", "target_bias", target_bias, vocabulary, device, FLOATING)
    check_vector("row_loss_gradient", "token_ids", token_ids, rows, device, (torch.int64,))
    check_vector("row_loss_gradient", "row_scale", row_scale, rows, device, (torch.float32,))
    for name, tensor in zip(RowStatistics._fields, statistics, strict=True):
        check_vector("row_loss_gradient", f"statistics.{name}", tensor, rows, device, (torch.float32,))
    check_no_reinterpretation("row_loss_gradient", "gradient", gradient, student=student, target=target)
    out = result_rows(len(RowLoss._fields), rows, device)
    if rows == 0:
        return RowLoss(*out)
    config, fast = launch.shipped_config(table_key(options), device), fast_instructions(device)
    plan(
        student, target, statistics, student_bias, target_bias, options, purified, token_ids, row_scale, gradient,
        out, config, fast,
    ).run(device)  # fmt: skip
    return RowLoss(*out)


def table_key(options: RowOptions) -> str:
    """This sweep's row in launch.TABLES."""
    return "loss_gradient" if options.entry_clip is None else "loss_gradient_entry_clip"


def plan(
    student: torch.Tensor,
    target: torch.Tensor,
    statistics: RowStatistics,
    student_bias: torch.Tensor | None,
    target_bias: torch.Tensor | None,
    options: RowOptions,
    purified: bool,
    token_ids: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    gradient: torch.Tensor | None,
    out: torch.Tensor,
    config: LaunchConfig,
    fast: bool,
) -> Launch:
    """The launch that `row_loss_gradient` makes, unchecked. out: [9, C] float32 from `result_rows`."""
    inv_temperature = float(options.inv_temperature)
    finished = logit_stream(target)
    if not purified:
        finished = target_stream(target, target_bias, options)
    return Launch(
        row_loss_gradient_kernel,
        student.shape[0],
        {
            "student": projection_stream(student, student_bias, options.student, inv_temperature),
            "target": finished,
            "statistics": tuple(statistics),
            "token_ids_ptr": token_ids,
            "row_scale_ptr": row_scale,
            "gradient": None if gradient is None else Gradient(gradient, gradient.stride(0)),
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "beta": kernel_beta(options.beta),
            "entry_clip": None if options.entry_clip is None else float(options.entry_clip),
            "token_clip": None if options.token_clip is None else float(options.token_clip),
            "V": student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "MODE": divergence_mode(options.beta),
            "RELATIVE": options.relative,
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
    RELATIVE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token: once over the row for the sums, then once more for the gradient unless ``one_read``."""
    row = tl.program_id(0)
    beta = tl.cast(beta, tl.float32)
    scalars = row_scalars(statistics, row)
    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    unclipped: tl.constexpr = entry_clip is None and token_clip is None
    one_read: tl.constexpr = MODE == FORWARD and not RELATIVE and unclipped and gradient is not None
    width: tl.constexpr = None if one_read else VEC  # one_read: 21.9 instructions per entry would become 22.9
    light: tl.constexpr = MODE == REVERSE or MODE == JENSEN_SHANNON  # the others would spill, unrolled
    unroll: tl.constexpr = 2 if light and entry_clip is None else 1
    exact: tl.constexpr = exact_logarithms(MODE, entry_clip)
    token_logit = None
    if one_read and token_ids_ptr is not None:  # the gradient, stored from here on, may lie over the student's rows
        token_logit = load_token_logit(student, token_ids_ptr, row, V, FAST)
        tl.debug_barrier()
    sums = zero_sums(BLOCK // VEC)
    full: tl.constexpr = V // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK, loop_unroll_factor=unroll):
        columns = start + tl.arange(0, BLOCK)
        entries = row_entries(student, target, scalars, row, columns, V, False, FAST, exact, RELATIVE)
        sums = accumulate(sums, entries, beta, entry_clip, VEC, MODE, FAST, RELATIVE)
        if one_read:
            store_gradient(
                gradient, student, entries, None, row_scale, beta, None, row, columns, V, MODE, False, FAST
            )  # fmt: skip
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        entries = row_entries(student, target, scalars, row, columns, V, True, FAST, exact, RELATIVE)
        sums = accumulate(sums, entries, beta, entry_clip, VEC, MODE, FAST, RELATIVE)
        if one_read:
            store_gradient(
                gradient, student, entries, None, row_scale, beta, None, row, columns, V, MODE, True, FAST
            )  # fmt: skip
    slope_sum, row_scale = finish_row(
        sums, student, scalars, token_ids_ptr, out_ptr, out_row_stride, row, row_scale, beta, entry_clip, token_clip,
        V, MODE, FAST, RELATIVE, token_logit,
    )  # fmt: skip
    if gradient is not None:
        tl.debug_barrier()  # other threads may still store this row's own gradient, or read the token's logit from under it
        if row_scale == 0.0:
            for start in range(0, V, BLOCK):
                store_block(gradient, row, start + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32), V, True, width)
        elif not one_read:
            for start in tl.range(0, full, BLOCK, loop_unroll_factor=2):
                columns = start + tl.arange(0, BLOCK)
                entries = row_entries(student, target, scalars, row, columns, V, False, FAST, exact, RELATIVE)
                store_gradient(
                    gradient, student, entries, slope_sum, row_scale, beta, entry_clip, row, columns,
                    V, MODE, False, FAST, width,
                )  # fmt: skip
            if full < V:
                columns = full + tl.arange(0, BLOCK)
                entries = row_entries(student, target, scalars, row, columns, V, True, FAST, exact, RELATIVE)
                store_gradient(
                    gradient, student, entries, slope_sum, row_scale, beta, entry_clip, row, columns,
                    V, MODE, True, FAST, width,
                )  # fmt: skip
