"""A row in slices, each in the registers of a program of its own: what few_rows.py and single_read.py share.

A slice goes through three phases: leave its normalisers; merge those of the row and leave sums; merge those and write the
gradient. Between two phases a program needs what its siblings left, by a launch of its own (few_rows.py) or by waiting for
them (single_read.py, PHASE 0).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels.checks import check_not_minus_student, check_output, check_rows, check_target, composing
from popsd_kernels.device.divergence import FORWARD, RENYI, REVERSE, coefficient_of, mode_of
from popsd_kernels.device.logits import floor_logit, load_logit
from popsd_kernels.device.operands import (
    composing_operand,
    composition,
    gradient_operand,
    offset_operand,
    optional,
    student_operand,
    target_operand,
)
from popsd_kernels.device.primitives import LOG2E, LOGIT_FLOOR, NOTHING, fma, lse_finish
from popsd_kernels.device.probabilities import entries_from, exact_logarithms, scalars_from
from popsd_kernels.device.row_loss import Sums, accumulate, finish_row, projection_gradient, store_block, zero_sums
from popsd_kernels.device.targets import load_offset, load_target_logit, target_gain
from popsd_kernels.launch import LaunchConfig, Outputs
from popsd_kernels.rows import RowLoss, RowOptions, Rows, RowStatistics

NORMALISERS = tl.constexpr(len(RowStatistics._fields))
RESULTS = NORMALISERS.value + len(RowLoss._fields)
"""Vectors that a call leaves, [13, C]: the normalisers, then the losses."""
PARTIALS = tl.constexpr(NORMALISERS.value + len(Sums._fields))
"""Scalars that a program leaves for its siblings: normalisers, then sums."""
VEC = tl.constexpr(4)
"""Neighbours that share an accumulator, all in one thread."""


@dataclass(frozen=True)
class SliceCall:
    """The tensors of one call, unchecked. outputs: [13, C], and the gradient. partials: from `partials_for`."""

    rows: Rows
    options: RowOptions
    outputs: Outputs
    partials: torch.Tensor
    config: LaunchConfig
    fast: bool

    @property
    def tokens(self) -> int:
        return self.rows.student.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.rows.student.shape[1]

    @property
    def slices(self) -> int:
        """Programs of a row."""
        return -(-self.vocabulary // self.config.block)

    def arguments(self) -> dict[str, Any]:
        """What both kernels take."""
        rows, options, results = self.rows, self.options, self.outputs.results
        return {
            "student": student_operand(rows, options),
            "target": target_operand(rows, options),
            "difference": composing_operand(rows, options),
            "offset_ptr": offset_operand(rows),
            "token_ids_ptr": rows.token_ids,
            "row_scale_ptr": rows.row_scale,
            "gradient": gradient_operand(self.outputs.matrix),
            "out_ptr": results,
            "out_row_stride": results.stride(0),
            "partials_ptr": self.partials,
            "composition": composition(rows, options),
            "clips": (optional(options.entry_clip), optional(options.token_clip)),
            "beta": coefficient_of(options),
            "V": self.vocabulary,
            "SLICE": self.config.block,
            "MODE": mode_of(options),
            "FAST": self.fast,
        }


def partials_for(rows: Rows, config: LaunchConfig) -> torch.Tensor:
    """[C, PARTIALS, slices]: a row's own, so that no program writes what a slower sibling of another row still reads."""
    tokens, vocabulary = rows.student.shape
    slices = -(-vocabulary // config.block)
    return torch.empty(tokens, PARTIALS.value, slices, dtype=torch.float32, device=rows.student.device)


def check_slices(function: str, rows: Rows, options: RowOptions, gradient: torch.Tensor | None) -> None:
    """What both launchers ask of their arguments. Programs of one row may read the student's slices of their siblings."""
    check_rows(function, rows, options)
    check_target(function, rows, finished=True)
    check_not_minus_student(function, options)
    check_output(
        function, "gradient", gradient, rows, replaceable=("target", *composing(rows)), untouchable=("student",)
    )  # fmt: skip


class Vectors(NamedTuple):
    """A number per row; None where not given."""

    offset_ptr: Any
    token_ids_ptr: Any
    row_scale_ptr: Any


class Exchange(NamedTuple):
    """Where results and partial results go. counters_ptr: two per row, at 0; None where nothing waits."""

    out_ptr: Any
    out_row_stride: Any
    partials_ptr: Any
    counters_ptr: Any


@triton.jit
def row_slice(
    student,
    target,
    difference,
    vectors,
    gradient,
    exchange,
    composition,
    clips,
    beta,
    row,
    part,
    V: tl.constexpr,
    SLICE: tl.constexpr,
    MODE: tl.constexpr,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One slice of a row in PHASE 1, 2 or 3; or in 0, all of them, waiting for the siblings in between."""
    slices: tl.constexpr = (V + SLICE - 1) // SLICE
    MASKED: tl.constexpr = V % SLICE != 0
    columns = part * SLICE + tl.arange(0, SLICE)
    partials = exchange.partials_ptr + row.to(tl.int64) * (PARTIALS * slices)
    out_ptr, out_row_stride = exchange.out_ptr + row, exchange.out_row_stride
    offset = 0.0
    if difference is not None:
        offset = load_offset(vectors.offset_ptr, row, composition)
    if part < V // SLICE:
        s, u = _load_slice(student, target, difference, offset, composition, row, columns, V, False, FAST)
    else:
        s, u = _load_slice(student, target, difference, offset, composition, row, columns, V, True, FAST)
    if PHASE <= 1:
        _store_normalisers(partials + part, tl.join(s, u), columns[:, None], V, slices, MASKED)
        if PHASE == 0:
            _arrive_and_wait(exchange.counters_ptr + 2 * row, slices)
    if PHASE != 1:
        scalars = _merge_normalisers(partials, out_ptr, out_row_stride, V, slices)
        entries = entries_from(s, u, scalars, columns, V, MASKED, 1.0, exact_logarithms(MODE, clips[0]))
        if PHASE != 3:
            sums = accumulate(zero_sums(SLICE // VEC), entries, beta, clips[0], VEC, MODE, FAST)
            _store_sums(partials + part + NORMALISERS * slices, sums, slices, MODE, clips[0] is not None)
            if PHASE == 0:
                _arrive_and_wait(exchange.counters_ptr + 2 * row + 1, slices)
        if PHASE != 2:
            row_scale = 1.0
            if vectors.row_scale_ptr is not None:
                row_scale = tl.load(vectors.row_scale_ptr + row)
            sums = _load_sums(partials + NORMALISERS * slices, slices)
            slope_sum, row_scale = finish_row(
                sums, student, scalars, vectors.token_ids_ptr, exchange.out_ptr + NORMALISERS * out_row_stride, out_row_stride,
                row, row_scale, beta, clips[0], clips[1], V, MODE, FAST,
            )  # fmt: skip
            if gradient is not None:
                width: tl.constexpr = 4 if PHASE == 3 else None  # PHASE 0, reverse KL: 2 spill instructions (sm_90)
                g = projection_gradient(student, entries, slope_sum, row_scale, beta, clips[0], MODE, FAST)
                g = tl.where(row_scale == 0.0, 0.0, g)
                if part < V // SLICE:
                    store_block(gradient, row, columns, g, V, False, width)
                else:
                    store_block(gradient, row, columns, g, V, True, width)


@triton.jit
def _load_slice(
    student,
    target,
    difference,
    offset,
    composition,
    row,
    columns,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Floored logits of student and target."""
    s = floor_logit(load_logit(student, row, columns, V, MASKED, FAST), columns, V, MASKED)
    u = load_target_logit(target, difference, offset, composition, row, columns, V, MASKED, FAST)
    if difference is None:  # a composed target is floored already
        u = floor_logit(u * target_gain(target, difference), columns, V, MASKED)
    return s, u


@triton.jit
def _arrive_and_wait(counter_ptr, COUNT: tl.constexpr):
    """Publishes what this program stored, then waits until all COUNT siblings have done so."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < COUNT:
        pass
    tl.debug_barrier()


@triton.jit
def _store_normalisers(pointer, x, columns, V: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """A slice's (max, sum of exp(x - max)) of student and target, x [SLICE, 2]. Every slice has an entry inside the vocabulary.

    Both at once: of each reduction over warps the compiler keeps a register from row to row (forward KL, sm_100: 2 spills).
    A NaN may be lost to the maximum: the sum is NaN then, and so are the row's normalisers.
    """
    if MASKED:
        x = tl.where(columns < V, x, float("-inf"))
    top = tl.maximum(tl.max(x, axis=0), NOTHING)
    pointers = pointer + tl.arange(0, 2) * (2 * STRIDE)
    tl.store(pointers, top)
    tl.store(pointers + STRIDE, tl.sum(tl.exp2(fma(x, LOG2E, (-top * LOG2E)[None, :])), axis=0))


@triton.jit
def _load_partials(pointer, INDEX: tl.constexpr, COUNT: tl.constexpr, OTHER: tl.constexpr):
    """One partial scalar of all slices, as a vector padded to a power of two; past the L1 cache, which may be stale."""
    lanes = tl.arange(0, triton.next_power_of_2(COUNT))
    return tl.load(pointer + INDEX * COUNT + lanes, mask=lanes < COUNT, other=OTHER, cache_modifier=".cg")


@triton.jit
def _merge_normalisers(pointer, out_ptr, out_row_stride, V: tl.constexpr, COUNT: tl.constexpr):
    """The row's RowScalars; every sibling stores the same four normalisers."""
    student_max, student_logsum = lse_finish(
        _load_partials(pointer, 0, COUNT, LOGIT_FLOOR), _load_partials(pointer, 1, COUNT, 0.0), V
    )
    target_max, target_logsum = lse_finish(
        _load_partials(pointer, 2, COUNT, LOGIT_FLOOR), _load_partials(pointer, 3, COUNT, 0.0), V
    )
    tl.store(out_ptr, student_max)
    tl.store(out_ptr + out_row_stride, student_logsum)
    tl.store(out_ptr + 2 * out_row_stride, target_max)
    tl.store(out_ptr + 3 * out_row_stride, target_logsum)
    return scalars_from(student_max, student_logsum, target_max, target_logsum)


@triton.jit
def _store_sums(pointer, sums, STRIDE: tl.constexpr, MODE: tl.constexpr, CLIPPED: tl.constexpr):
    """Those that the mode has: the sum of a block of zeros would be computed too, and kept in a register from row to row."""
    tl.store(pointer, 0.0 if MODE == FORWARD else tl.sum(sums.student_kl, axis=0))
    tl.store(pointer + STRIDE, 0.0 if MODE == REVERSE else tl.sum(sums.target_kl, axis=0))
    tl.store(pointer + 2 * STRIDE, tl.sum(sums.student_entropy, axis=0))
    tl.store(pointer + 3 * STRIDE, tl.sum(sums.target_entropy, axis=0))
    tl.store(pointer + 4 * STRIDE, tl.max(sums.top, axis=0))
    if CLIPPED:
        tl.store(pointer + 5 * STRIDE, tl.sum(sums.clipped_divergence, axis=0))
        tl.store(pointer + 6 * STRIDE, tl.sum(sums.capped, axis=0))
    if CLIPPED or MODE == RENYI:
        tl.store(pointer + 7 * STRIDE, tl.sum(sums.slope, axis=0))


@triton.jit
def _load_sums(pointer, COUNT: tl.constexpr):
    return Sums(
        _load_partials(pointer, 0, COUNT, 0.0),
        _load_partials(pointer, 1, COUNT, 0.0),
        _load_partials(pointer, 2, COUNT, 0.0),
        _load_partials(pointer, 3, COUNT, 0.0),
        _load_partials(pointer, 4, COUNT, LOGIT_FLOOR),
        _load_partials(pointer, 5, COUNT, 0.0),
        _load_partials(pointer, 6, COUNT, 0.0),
        _load_partials(pointer, 7, COUNT, 0.0),
    )
