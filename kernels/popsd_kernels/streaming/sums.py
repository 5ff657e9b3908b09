"""Passes 2 and 3 of the streaming path: the same tiles projected again, into losses and into the gradient."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels.device.divergence import RENYI
from popsd_kernels.device.primitives import LN2, LOGIT_FLOOR
from popsd_kernels.device.probabilities import entries_from, exact_logarithms, row_scalars
from popsd_kernels.device.row_loss import Sums, accumulate, finish_row, projection_gradient
from popsd_kernels.rows import RowLoss
from popsd_kernels.streaming.tiles import QUARTERS, Extent, load_offsets, program_share, project, quarter_logits

TOKEN_LOGIT = tl.constexpr(len(Sums._fields))
SUMS = TOKEN_LOGIT.value + 1
"""Rows of a part of the second pass: the fields of Sums, then the sampled token's logit."""
TOKEN_LOGPROB = tl.constexpr(RowLoss._fields.index("token_logprob"))


class Strip(NamedTuple):
    """The gradient of the tiles of one Extent, [tokens rounded up, columns].

    No gradient: ``ptr`` is None, not the strip itself. Triton 3.6 cannot compare with None a tuple that holds one."""

    ptr: Any
    row_stride: Any


class Scaling(NamedTuple):
    """Per token [N]: sum of slopes (divergence.py) and factor of the gradient; None stands for 0 and for 1."""

    slope_sum_ptr: Any
    scale_ptr: Any


@triton.jit
def _zero_sums(BLOCK_M: tl.constexpr):
    zero = tl.zeros([BLOCK_M], tl.float32)
    return Sums(zero, zero, zero, zero, zero + LOGIT_FLOOR, zero, zero, zero)


@triton.jit
def _add_tile(sums, entries, beta, entry_clip, MODE: tl.constexpr, FAST: tl.constexpr):
    """Sums [BLOCK_M] plus the row sums of a tile."""
    zero = tl.zeros_like(entries.p)
    tile = Sums(zero, zero, zero, zero, zero + LOGIT_FLOOR, zero, zero, zero)
    tile = accumulate(tile, entries, beta, entry_clip, 1, MODE, FAST)
    clipped_divergence, capped, slope = sums.clipped_divergence, sums.capped, sums.slope
    if entry_clip is not None:
        clipped_divergence += tl.sum(tile.clipped_divergence, axis=1)
        capped += tl.sum(tile.capped, axis=1)
        slope += tl.sum(tile.slope, axis=1)
    elif MODE == RENYI:
        slope += tl.sum(tile.slope, axis=1)
    return Sums(
        sums.student_kl + tl.sum(tile.student_kl, axis=1),
        sums.target_kl + tl.sum(tile.target_kl, axis=1),
        sums.student_entropy + tl.sum(tile.student_entropy, axis=1),
        sums.target_entropy + tl.sum(tile.target_entropy, axis=1),
        tl.maximum(sums.top, tl.max(tile.top, axis=1)),
        clipped_divergence,
        capped,
        slope,
    )


@triton.jit
def _gradient(streams, entries, slope_sum, scale, beta, entry_clip, MODE: tl.constexpr, FAST: tl.constexpr):
    """d loss / d raw projection of a tile, exactly 0 where ``scale`` is, whatever the row holds."""
    g = projection_gradient(streams.student, entries, slope_sum, scale, beta, entry_clip, MODE, FAST)
    return tl.where(scale == 0.0, 0.0, g)


@triton.jit(do_not_specialize=["tokens", "first", "last", "span"], do_not_specialize_on_alignment=["token_ids_ptr"])
def stream_accumulate_kernel(
    streams,
    statistics,
    token_ids_ptr,
    scaling,
    sums_out,
    strip,
    tokens,
    first,
    last,
    span,
    beta,
    entry_clip,
    V: tl.constexpr,
    D: tl.constexpr,
    FROZEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MODE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Passes 2 and 3, the projection made again: per-token sums (``sums_out``), the gradient (``strip``), or both."""
    MASKED: tl.constexpr = V % BLOCK_V != 0
    extent = Extent(tokens, first, last, span)
    part, token_tile, begin, end = program_share(extent, BLOCK_M)
    row = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, tokens - 1)
    beta = tl.cast(beta, tl.float32)
    scalars = row_scalars(statistics, rows[:, None])
    offset = load_offsets(streams, rows)
    exact: tl.constexpr = exact_logarithms(MODE, entry_clip)
    if sums_out is not None:
        sums, token_logit = _zero_sums(BLOCK_M), tl.zeros([BLOCK_M], tl.float32)
        if token_ids_ptr is not None:
            token = tl.load(token_ids_ptr + rows)
    if strip.ptr is not None:
        slope_sum, scale = tl.zeros([BLOCK_M, 1], tl.float32), tl.full([BLOCK_M, 1], 1.0, tl.float32)
        if scaling.slope_sum_ptr is not None:
            slope_sum = tl.load(scaling.slope_sum_ptr + rows)[:, None]
        if scaling.scale_ptr is not None:
            scale = tl.load(scaling.scale_ptr + rows)[:, None]
    for tile in range(begin, end):
        projected = project(streams, tokens, token_tile, tile, V, D, FROZEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
        for quarter in tl.static_range(QUARTERS):
            columns, s, u = quarter_logits(streams, projected, tile, offset, quarter, V, BLOCK_V, FAST)
            entries = entries_from(s, u, scalars, columns[None, :], V, MASKED, 1.0, exact)
            if sums_out is not None:
                sums = _add_tile(sums, entries, beta, entry_clip, MODE, FAST)
                if token_ids_ptr is not None:
                    token_logit += tl.sum(tl.where(columns[None, :] == token[:, None], s, 0.0), axis=1)
            if strip.ptr is not None:
                g = _gradient(streams, entries, slope_sum, scale, beta, entry_clip, MODE, FAST)
                _store_strip(strip, g, row, columns, first * BLOCK_V, V, MASKED)
    if sums_out is not None:
        pointers = sums_out.ptr + part.to(tl.int64) * sums_out.part_stride + row
        inside = row < tokens
        for i in tl.static_range(TOKEN_LOGIT):
            tl.store(pointers + i * sums_out.row_stride, sums[i], mask=inside)
        tl.store(pointers + TOKEN_LOGIT * sums_out.row_stride, token_logit, mask=inside)


@triton.jit
def _store_strip(strip, g, rows, columns, origin, V: tl.constexpr, MASKED: tl.constexpr):
    """The strip has rows for whole token tiles and columns for whole vocabulary tiles: no mask; zeros beyond V."""
    if MASKED:
        g = tl.where(columns[None, :] < V, g, 0.0)
    pointers = strip.ptr + rows.to(tl.int64)[:, None] * strip.row_stride
    tl.store(pointers + (columns - origin)[None, :], g.to(strip.ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=["part_count", "out_row_stride"],
    do_not_specialize_on_alignment=["token_ids_ptr", "row_scale_ptr"],
)
def stream_finish_kernel(
    statistics,
    partial,
    part_count,
    token_ids_ptr,
    row_scale_ptr,
    scaling,
    out_ptr,
    out_row_stride,
    beta,
    entry_clip,
    token_clip,
    V: tl.constexpr,
    LANES: tl.constexpr,
    MODE: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per token: the parts of pass 2 into the nine results [9, N], and the gradient's scaling."""
    row, lanes = tl.program_id(0), tl.arange(0, LANES)
    given, step = lanes < part_count, partial.row_stride
    pointers = partial.ptr + lanes.to(tl.int64) * partial.part_stride + row
    sums = Sums(
        tl.load(pointers, mask=given, other=0.0),
        tl.load(pointers + step, mask=given, other=0.0),
        tl.load(pointers + 2 * step, mask=given, other=0.0),
        tl.load(pointers + 3 * step, mask=given, other=0.0),
        tl.load(pointers + 4 * step, mask=given, other=LOGIT_FLOOR),
        tl.load(pointers + 5 * step, mask=given, other=0.0),
        tl.load(pointers + 6 * step, mask=given, other=0.0),
        tl.load(pointers + 7 * step, mask=given, other=0.0),
    )
    row_scale = 1.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row)
    scalars = row_scalars(statistics, row)
    slope_sum, row_scale = finish_row(
        sums, None, scalars, None, out_ptr, out_row_stride, row, row_scale, tl.cast(beta, tl.float32), entry_clip,
        token_clip, V, MODE, FAST,
    )  # fmt: skip
    if token_ids_ptr is not None:
        token = tl.load(token_ids_ptr + row)
        logit = tl.sum(tl.load(pointers + TOKEN_LOGIT * step, mask=given, other=0.0), axis=0)
        log_p = (logit - scalars.student_max) - scalars.student_log2sum * LN2
        tl.store(
            out_ptr + TOKEN_LOGPROB * out_row_stride + row, tl.where((token >= 0) & (token < V), log_p, float("nan"))
        )
    tl.store(scaling.slope_sum_ptr + row, slope_sum)
    tl.store(scaling.scale_ptr + row, row_scale)
