"""Entries of the purified target that must not move, or not far: edits of the difference teacher − reference in place.

An entry that must stay gets the value that makes its Δ̄ zero, one that may move little is clamped about it; the sweeps need no
option for that. 4 bytes per entry of each stream that has a threshold to find, then 12 to 16 to apply them.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.checks import FLOATING, check_device, check_matrix_shape, check_rows, check_vector
from popsd_kernels.device.logits import floor_logit, load_logit, projection_stream
from popsd_kernels.device.primitives import LOGIT_FLOOR, NOTHING, lane_max, lse_finish, lse_fold
from popsd_kernels.launch import Launch, LaunchConfig, fast_instructions, result_rows
from popsd_kernels.rows import RowOptions

Streams = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def entry_thresholds(
    base: torch.Tensor | None,
    teacher: torch.Tensor | None,
    reference: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    options: RowOptions,
    plausibility: float | None = None,
    tail_floor: float | None = None,
) -> torch.Tensor:
    """Tempered logits below which an entry is implausible or faint: [3, C] float32, −inf where nothing is asked.

    First row: the largest of ``base`` plus log plausibility, None both or given both. Second and third: of ``teacher`` and
    ``reference``, their log-normaliser plus log tail_floor, all three or none of them.
    base, teacher, reference: [C, V] raw projections, float32, bfloat16 or float16, unit stride along V. bias: [V], of them all.
    Raises ValueError, TypeError or RuntimeError before any launch. Not yet run on a GPU.
    """
    name, streams = "entry_thresholds", {"base": base, "teacher": teacher, "reference": reference}
    if (base is None) != (plausibility is None) or len({x is None for x in (teacher, reference, tail_floor)}) > 1:
        raise ValueError(
            f"{name}: base goes with plausibility, and teacher and reference with tail_floor, got "
            f"{[x for x, value in streams.items() if value is not None]} with plausibility={plausibility} and "
            f"tail_floor={tail_floor}; leave out the streams that have no threshold"
        )
    if base is None and teacher is None:
        raise ValueError(f"{name}: a stream with its threshold must be given, got none; without masks do not call it")
    given = _checked(name, "teacher" if base is None else "base", streams, bias)
    out = result_rows(3, given.shape[0], given.device).fill_(-torch.inf)
    if given.shape[0]:
        floors = tuple(None if x is None else math.log(x) for x in (plausibility, tail_floor))
        config, fast = launch.shipped_config("masks", given.device), fast_instructions(given.device)
        plan_thresholds((base, teacher, reference), bias, options, floors, out, config, fast).run(given.device)
    return out


def mask_entries(
    delta: torch.Tensor,
    offset: torch.Tensor,
    thresholds: torch.Tensor,
    base: torch.Tensor | None,
    reference: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    options: RowOptions,
    tail_reach: float | None = None,
) -> None:
    """Edits ``delta`` [C, V] float32 in place, Δ̄ = inv_temperature · delta_scale · delta − offset, offset [C] float32.

    Where the tempered logits of ``reference`` and of the teacher, which is reference plus difference, are below ``thresholds``,
    |Δ̄| ≤ tail_reach; then, where those of ``base`` are, Δ̄ = 0. None leaves a mask out. thresholds: `entry_thresholds`.
    base, reference, bias, options: as there. Raises ValueError, TypeError or RuntimeError before any launch.
    """
    name = "mask_entries"
    _checked(name, "delta", {"delta": delta, "base": base, "reference": reference}, bias)
    check_vector(name, "offset", offset, delta.shape[0], delta.device, (torch.float32,))
    for row in range(3):
        check_vector(name, f"thresholds[{row}]", thresholds[row], delta.shape[0], delta.device, (torch.float32,))
    if delta.dtype != torch.float32:
        raise TypeError(f"{name}: delta must be torch.float32, got {delta.dtype}; the difference is composed in it")
    if (reference is None) != (tail_reach is None):
        raise ValueError(f"{name}: reference and tail_reach must be given together, got tail_reach={tail_reach}")
    if delta.shape[0]:
        config, fast = launch.shipped_config("masks", delta.device), fast_instructions(delta.device)
        plan_masks(
            delta, offset, thresholds, base, reference, bias, options, tail_reach, config, fast
        ).run(delta.device)  # fmt: skip


def _checked(
    function: str, first: str, streams: dict[str, torch.Tensor | None], bias: torch.Tensor | None
) -> torch.Tensor:
    """The stream named ``first``, which fixes C and V for the others and the bias."""
    given = streams[first]
    assert given is not None
    check_matrix_shape(function, first, given)
    check_device(function, first, given)
    check_rows(function, given.shape, given.device, streams)
    check_vector(function, "bias", bias, given.shape[1], given.device, FLOATING)
    return given


def plan_thresholds(
    streams: Streams,
    bias: torch.Tensor | None,
    options: RowOptions,
    floors: tuple[float | None, ...],
    out: torch.Tensor,
    config: LaunchConfig,
    fast: bool,
) -> Launch:
    """The launch that `entry_thresholds` makes, unchecked. floors: logarithms of plausibility and tail_floor."""
    base, teacher, reference = (_stream(x, bias, options) for x in streams)
    given = next(x for x in streams if x is not None)
    return Launch(
        entry_thresholds_kernel,
        given.shape[0],
        {
            "base": base,
            "teacher": teacher,
            "reference": reference,
            "plausibility": floors[0],
            "tail": floors[1],
            "out_ptr": out,
            "out_row_stride": out.stride(0),
            "V": given.shape[1],
            "BLOCK": config.block,
            "VEC": config.vec,
            "FAST": fast,
        },
        config,
    )


def plan_masks(
    delta: torch.Tensor,
    offset: torch.Tensor,
    thresholds: torch.Tensor,
    base: torch.Tensor | None,
    reference: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: RowOptions,
    tail_reach: float | None,
    config: LaunchConfig,
    fast: bool,
) -> Launch:
    """The launch that `mask_entries` makes, unchecked."""
    return Launch(
        mask_entries_kernel,
        delta.shape[0],
        {
            "delta_ptr": delta,
            "delta_row_stride": delta.stride(0),
            "offset_ptr": offset,
            "threshold_ptr": thresholds,
            "threshold_row_stride": thresholds.stride(0),
            "base": _stream(base, bias, options),
            "reference": _stream(reference, bias, options),
            "gain": float(options.delta_scale) * float(options.inv_temperature),
            "reach": tail_reach,
            "PLAUSIBLE": base is not None,
            "V": delta.shape[1],
            "BLOCK": config.block,
            "FAST": fast,
        },
        config,
    )


def _stream(tensor: torch.Tensor | None, bias: torch.Tensor | None, options: RowOptions) -> object:
    return None if tensor is None else projection_stream(tensor, bias, options.target, float(options.inv_temperature))


class Thresholds(NamedTuple):
    """Of a row, as `entry_thresholds` has them."""

    implausible: Any
    faint_teacher: Any
    faint_reference: Any


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
        top, total = lse_fold(z, top, total, VEC)
    if full < V:
        columns = full + tl.arange(0, BLOCK)
        z = tl.where(columns < V, load_logit(stream, row, columns, V, True, FAST), float("-inf"))
        top, total = lse_fold(z, top, total, VEC)
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
