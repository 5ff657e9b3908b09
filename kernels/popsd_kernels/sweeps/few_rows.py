"""Few tokens: a row over several programs, a slice each, in three launches; nothing waits.

Normalisers, sums and gradient of the slices are a launch each and each reads the row anew, 38 bytes per entry where the two
sweeps move 26 to 34: worth it where a program per row would leave most of a GPU idle (`launch.too_few_rows`).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from popsd_kernels.launch import Launch, Outputs, fast_instructions, result_rows, shipped_config
from popsd_kernels.rows import RowLoss, RowOptions, Rows, RowStatistics
from popsd_kernels.sweeps.row_slices import (
    NORMALISERS,
    RESULTS,
    Exchange,
    SliceCall,
    Vectors,
    check_slices,
    partials_for,
    row_slice,
)

_NAME = "row_split_sweeps"


def row_split_sweeps(
    rows: Rows,
    options: RowOptions,
    *,
    gradient: torch.Tensor | None = None,
    between: Callable[[int, torch.Tensor], None] | None = None,
) -> tuple[RowStatistics, RowLoss]:
    """The results of `row_statistics` and `row_loss_gradient` for few tokens; a composed target's logits are not written.

    rows: as in `row_statistics`; read only, but for the aliasing below.
    gradient: [C, V], or None for no gradient work. It may be ``rows.base``, ``rows.target`` or ``rows.difference`` itself
        (same memory, dtype size and strides): a slice of each is read for the last time by the program that writes the gradient
        there. Any other memory in common with them, and any with ``rows.student``, is refused: another program of the row may
        still read it.
    between: called with 1 after the first launch and with 2 after the second, and with what the slices have left, which is
        [C, 12, slices] float32: rows 0 to 3 are `RowStatistics` as (max, Σ exp(x − max)), the others `Sums`. It may put into
        them what other processes know, where each of them holds some of the vocabulary.
    A NaN anywhere in a row makes that row's losses and gradient NaN and no other's; row_scale 0 gives a gradient of zeros.
    Raises ValueError, TypeError or RuntimeError before any launch.
    """
    check_slices(_NAME, rows, options, gradient)
    tokens, device = rows.student.shape[0], rows.student.device
    results = result_rows(RESULTS, tokens, device)
    if tokens:
        config, fast = shipped_config("single_read", device), fast_instructions(device)
        call = SliceCall(rows, options, Outputs(results, gradient), partials_for(rows, config), config, fast)
        for phase in (1, 2, 3):
            plan(call, phase).run(device)
            if between is not None and phase < 3:
                between(phase, call.partials)
    return RowStatistics(*results[: NORMALISERS.value]), RowLoss(*results[NORMALISERS.value :])


def plan(call: SliceCall, phase: int) -> Launch:
    """One of the three launches, phases 1, 2 and 3."""
    return Launch(row_split_kernel, call.tokens * call.slices, {**call.arguments(), "PHASE": phase}, call.config)


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
    composition,
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
        student, target, difference, vectors, gradient, exchange, composition, clips, tl.cast(beta, tl.float32), row, part,
        V, SLICE, MODE, PHASE, FAST,
    )  # fmt: skip
