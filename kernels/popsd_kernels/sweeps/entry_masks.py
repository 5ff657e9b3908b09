"""Entries of the purified target that must not move, or not far: edits of the difference teacher − reference in place.

An entry that must stay gets the value that makes its Δ̄ zero. One that may move little is clamped about that value. So the
sweeps need no option for masks. Thresholds read 4 bytes per entry of each stream that has one; applying them moves 12 to 16.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.checks import FLOAT32, check_not_minus_student, check_output, check_rows, check_vector
from popsd_kernels.device.logits import Stream, floor_logit, load_logit
from popsd_kernels.device.operands import frozen_operand
from popsd_kernels.device.primitives import LOGIT_FLOOR, NOTHING, lane_max, lse_accumulate, lse_finish
from popsd_kernels.launch import Launch, LaunchConfig, Outputs, fast_instructions, result_rows
from popsd_kernels.rows import EntryMasks, RowOptions, Rows


class Thresholds(NamedTuple):
    """Of a row, as `entry_thresholds` has them."""

    implausible: Any
    faint_teacher: Any
    faint_reference: Any


def entry_thresholds(rows: Rows, masks: EntryMasks, options: RowOptions) -> torch.Tensor:
    """Tempered logits below which an entry is implausible or faint: [3, C] float32, −inf where nothing is asked.

    First row: the largest of ``rows.base`` plus log plausibility. Second and third: of ``rows.teacher`` and
    ``rows.reference``, their log-normaliser plus log tail_floor. A stream without a mask is not read.
    Raises ValueError, TypeError or RuntimeError before any launch. Not yet run on a GPU.
    """
    name = "entry_thresholds"
    tail = () if masks.tail_floor is None else ("teacher", "reference")
    _check(name, rows, masks, options, tail)
    tokens, device = rows.student.shape[0], rows.student.device
    out = result_rows(len(Thresholds._fields), tokens, device).fill_(-torch.inf)
    if tokens:
        config, fast = launch.shipped_config("masks", device), fast_instructions(device)
        plan_thresholds(rows, masks, options, Outputs(out), config, fast).run(device)
    return out


def mask_entries(rows: Rows, thresholds: torch.Tensor, masks: EntryMasks, options: RowOptions) -> None:
    """Edits ``rows.difference`` [C, V] float32 in place, Δ̄ = inv_temperature · delta_scale · difference − rows.offset.

    Where the tempered logits of ``rows.reference`` and of the teacher, which is reference plus difference, are below
    ``thresholds``, |Δ̄| ≤ tail_reach; then, where those of ``rows.base`` are, Δ̄ = 0. ``rows.teacher`` is not read, so the
    difference may have taken its memory.
    thresholds: [3, C], what `entry_thresholds` returned for the same masks and options.
    Raises ValueError, TypeError or RuntimeError before any launch.
    """
    name = "mask_entries"
    tail = () if masks.tail_floor is None else ("reference",)
    _check(name, rows, masks, options, (*tail, "difference", "offset"))
    tokens, device = rows.student.shape[0], rows.student.device
    if thresholds.dim() != 2 or thresholds.shape[0] != len(Thresholds._fields):
        raise ValueError(
            f"{name}: thresholds must be [{len(Thresholds._fields)}, tokens], got {list(thresholds.shape)}; pass what "
            "entry_thresholds returned"
        )
    for field, row in zip(Thresholds._fields, thresholds, strict=True):
        check_vector(name, f"thresholds.{field}", row, tokens, device, FLOAT32)
    read = ("reference",) * bool(tail) + ("base",) * (masks.plausibility is not None)
    check_output(name, "rows.difference", rows.difference, rows, dtypes=FLOAT32, untouchable=read)
    if tokens:
        config, fast = launch.shipped_config("masks", device), fast_instructions(device)
        plan_masks(rows, thresholds, masks, options, config, fast).run(device)


def _check(function: str, rows: Rows, masks: EntryMasks, options: RowOptions, needed: Sequence[str]) -> None:
    if masks.plausibility is None and masks.tail_floor is None:
        raise ValueError(
            f"{function}: masks must have a plausibility or a tail_floor, got neither; without do not call it"
        )
    if (masks.tail_floor is None) != (masks.tail_reach is None):
        raise ValueError(
            f"{function}: masks.tail_floor and masks.tail_reach must be given together, got tail_floor={masks.tail_floor} and "
            f"tail_reach={masks.tail_reach}; leave both out for no mask on the tail"
        )
    check_not_minus_student(function, options)
    check_rows(function, rows, options, needed=(*needed, *(("base",) if masks.plausibility is not None else ())))


def plan_thresholds(
    rows: Rows, masks: EntryMasks, options: RowOptions, outputs: Outputs, config: LaunchConfig, fast: bool
) -> Launch:
    """The launch that `entry_thresholds` makes, unchecked. outputs: [3, C]."""
    floors = [None if x is None else math.log(x) for x in (masks.plausibility, masks.tail_floor)]
    tail = masks.tail_floor is not None
    return Launch(
        entry_thresholds_kernel,
        rows.student.shape[0],
        {
            "base": _stream(rows.base, rows, options, masks.plausibility is not None),
            "teacher": _stream(rows.teacher, rows, options, tail),
            "reference": _stream(rows.reference, rows, options, tail),
            "plausibility": floors[0],
            "tail": floors[1],
            "out_ptr": outputs.results,
            "out_row_stride": outputs.results.stride(0),
            "V": rows.student.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "FAST": fast,
        },
        config,
    )


def plan_masks(
    rows: Rows, thresholds: torch.Tensor, masks: EntryMasks, options: RowOptions, config: LaunchConfig, fast: bool
) -> Launch:
    """The launch that `mask_entries` makes, unchecked."""
    assert rows.difference is not None
    return Launch(
        mask_entries_kernel,
        rows.student.shape[0],
        {
            "delta_ptr": rows.difference,
            "delta_row_stride": rows.difference.stride(0),
            "offset_ptr": rows.offset,
            "threshold_ptr": thresholds,
            "threshold_row_stride": thresholds.stride(0),
            "base": _stream(rows.base, rows, options, masks.plausibility is not None),
            "reference": _stream(rows.reference, rows, options, masks.tail_floor is not None),
            "gain": float(options.delta_scale) * float(options.inv_temperature),
            "reach": masks.tail_reach,
            "PLAUSIBLE": masks.plausibility is not None,
            "V": rows.student.shape[1],
            "BLOCK": config.block,
            "FAST": fast,
        },
        config,
    )


def _stream(tensor: torch.Tensor | None, rows: Rows, options: RowOptions, wanted: bool) -> Stream | None:
    return frozen_operand(tensor, rows, options) if wanted and tensor is not None else None


@triton.jit(do_not_specialize=["out_row_stride"])
def entry_thresholds_kernel(
    base,
    teacher,
    reference,
    plausibility,
    tail,
    out_ptr,
    out_row_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token."""
    row = tl.program_id(0)
    if plausibility is not None:  # not `base`: Triton 3.6 cannot compare with None a tuple that holds one
        highest = _highest(base, row, V, BLOCK, VEC, FAST)
        tl.store(out_ptr + row, highest + tl.cast(plausibility, tl.float32))
    if tail is not None:
        floor = tl.cast(tail, tl.float32)
        tl.store(out_ptr + out_row_stride + row, _log_sum(teacher, row, V, BLOCK, VEC, FAST) + floor)
        tl.store(out_ptr + 2 * out_row_stride + row, _log_sum(reference, row, V, BLOCK, VEC, FAST) + floor)


@triton.jit
def _highest(stream, row, V: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, FAST: tl.constexpr):
    """The largest logit of a row, LOGIT_FLOOR where no entry is possible. Full blocks run unmasked, as in the sweeps."""
    top, full = tl.full([BLOCK // VEC], LOGIT_FLOOR, tl.float32), V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        z = load_logit(stream, row, start + tl.arange(0, BLOCK), V, False, FAST)
        top = tl.maximum(top, lane_max(z, VEC))
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        z = tl.where(columns < V, load_logit(stream, row, columns, V, True, FAST), LOGIT_FLOOR)
        top = tl.maximum(top, lane_max(z, VEC))
    return tl.max(top, axis=0)


@triton.jit
def _log_sum(stream, row, V: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, FAST: tl.constexpr):
    """The log-normaliser of a row."""
    top, total = tl.full([BLOCK // VEC], NOTHING, tl.float32), tl.zeros([BLOCK // VEC], tl.float32)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        z = load_logit(stream, row, start + tl.arange(0, BLOCK), V, False, FAST)
        top, total = lse_accumulate(z, top, total, VEC)
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        z = tl.where(columns < V, load_logit(stream, row, columns, V, True, FAST), float("-inf"))
        top, total = lse_accumulate(z, top, total, VEC)
    row_max, logsum = lse_finish(top, total, V)
    return row_max + logsum


@triton.jit(do_not_specialize=["threshold_row_stride"])
def mask_entries_kernel(
    delta_ptr,
    delta_row_stride,
    offset_ptr,
    threshold_ptr,
    threshold_row_stride,
    base,
    reference,
    gain,
    reach,
    PLAUSIBLE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token. Full blocks run unmasked; a vocabulary that BLOCK does not divide has one masked tail."""
    row, full = tl.program_id(0), V // BLOCK * BLOCK
    gain = tl.cast(gain, tl.float32)
    delta_ptr += row.to(tl.int64) * delta_row_stride
    still, threshold_ptr = tl.load(offset_ptr + row) / gain, threshold_ptr + row
    thresholds = Thresholds(
        tl.load(threshold_ptr),
        tl.load(threshold_ptr + threshold_row_stride),
        tl.load(threshold_ptr + 2 * threshold_row_stride),
    )
    for start in range(0, full, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        delta = _masked(
            tl.load(delta_ptr + columns), thresholds, base, reference, still, gain, reach, row, columns,
            PLAUSIBLE, V, False, FAST,
        )  # fmt: skip
        tl.store(delta_ptr + columns, delta)
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        delta = _masked(
            tl.load(delta_ptr + columns, mask=columns < V, other=0.0), thresholds, base, reference, still, gain, reach,
            row, columns, PLAUSIBLE, V, True, FAST,
        )  # fmt: skip
        tl.store(delta_ptr + columns, delta, mask=columns < V)


@triton.jit
def _masked(
    delta,
    thresholds,
    base,
    reference,
    still,
    gain,
    reach,
    row,
    columns,
    PLAUSIBLE: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block of differences after the masks. No comparison holds for a NaN, so one stays, be it delta's or a stream's."""
    if reach is not None:
        r = floor_logit(load_logit(reference, row, columns, V, MASKED, FAST), columns, V, MASKED)
        faint = (r < thresholds.faint_reference) & (r + gain * delta < thresholds.faint_teacher)
        far = tl.cast(reach, tl.float32) / gain
        near = tl.clamp(delta, still - far, still + far, propagate_nan=tl.PropagateNan.ALL)
        delta = tl.where(faint, near, delta)
    if PLAUSIBLE:
        b = floor_logit(load_logit(base, row, columns, V, MASKED, FAST), columns, V, MASKED)
        delta = tl.where((b < thresholds.implausible) & (delta == delta), still, delta)
    return delta
