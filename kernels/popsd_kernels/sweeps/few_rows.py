"""Few tokens: a row over several programs, a slice each, in three launches; nothing waits.

Normalisers, sums and gradient of the slices are a launch each and each reads the row anew, 38 bytes per entry where the two
sweeps move 26 to 34: worth it where a program per row would leave most of a GPU idle (`launch.too_few_rows`).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from popsd_kernels.checks import FLOATING, check_vector
from popsd_kernels.launch import Launch, fast_instructions, result_rows, shipped_config
from popsd_kernels.rows import RowLoss, RowOptions, RowStatistics
from popsd_kernels.sweeps.row_slices import (
    RESULTS,
    Exchange,
    SliceCall,
    Vectors,
    check_slice_inputs,
    partials_for,
    row_slice,
)


def row_split_sweeps(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None = None,
    delta_offset: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
    options: RowOptions,
    token_ids: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
) -> RowLoss:
    """The results of `row_statistics` and `row_loss_gradient` for few tokens, with their arguments; nothing else is written.

    gradient: [C, V], or None for no gradient work. It may be ``target`` or ``delta`` itself (same memory, dtype size and
        strides): a slice of either is read for the last time by the program that writes the gradient there. Any other
        memory in common with them, and any with ``student``, is refused: another program of the row may still read it.
    A NaN anywhere in a row makes that row's losses and gradient NaN and no other's; row_scale 0 gives a gradient of zeros.
    Raises ValueError, TypeError or RuntimeError before any launch.
    """
    name = "row_split_sweeps"
    check_slice_inputs(name, student, target, delta, delta_offset, options, token_ids, row_scale, gradient)
    (rows, vocabulary), device = student.shape, student.device
    check_vector(name, "student_bias", student_bias, vocabulary, device, FLOATING)
    check_vector(name, "target_bias", target_bias, vocabulary, device, FLOATING)
    if (delta is None) != (delta_offset is None):
        raise ValueError(f"{name}: delta and delta_offset must be given together or not at all; got one of them")
    out = result_rows(RESULTS, rows, device)
    if rows:
        config = shipped_config("single_read", device)
        call = SliceCall(
            student, target, delta, delta_offset, token_ids, row_scale, gradient, out, partials_for(student, config),
            options, config, fast_instructions(device), student_bias, target_bias,
        )  # fmt: skip
        for phase in (1, 2, 3):
            plan(call, phase).run(device)
    return RowLoss(*out[len(RowStatistics._fields) :])


def plan(call: SliceCall, phase: int) -> Launch:
    """One of the three launches, phases 1, 2 and 3."""
    return Launch(row_split_kernel, call.rows * call.slices, {**call.arguments(), "PHASE": phase}, call.config)


@triton.jit(
    do_not_specialize=["out_row_stride"],
    do_not_specialize_on_alignment=["offset_ptr", "token_ids_ptr", "row_scale_ptr"],
)
def row_split_kernel(
    student,
    target,
    difference,
    offset_ptr,
    token_ids_ptr,
    row_scale_ptr,
    gradient,
    out_ptr,
    out_row_stride,
    partials_ptr,
    pmi,
    clips,
    beta,
    V: tl.constexpr,
    SLICE: tl.constexpr,
    MODE: tl.constexpr,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per slice of a row: its normalisers (PHASE 1), sums (2) or gradient (3)."""
    slices: tl.constexpr = (V + SLICE - 1) // SLICE
    row, part = tl.program_id(0) // slices, tl.program_id(0) % slices
    vectors = Vectors(offset_ptr, token_ids_ptr, row_scale_ptr)
    exchange = Exchange(out_ptr, out_row_stride, partials_ptr, None)
    row_slice(
        student, target, difference, vectors, gradient, exchange, pmi, clips, tl.cast(beta, tl.float32), row, part,
        V, SLICE, MODE, PHASE, FAST,
    )  # fmt: skip
