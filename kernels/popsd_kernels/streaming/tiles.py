"""A tile of logits is projected from hidden states, summed, and forgotten: the projection, and the normalisers (pass 1).

A program owns BLOCK_M tokens and walks over vocabulary tiles. One tile of W, loaded once, serves three accumulators:

    [student; base; teacher - reference] (BLOCK_M x D each)  .  W_tile^T (D x BLOCK_V)  ->  3 x [BLOCK_M, BLOCK_V]

in registers, where the formulas of the row sweeps take over. Nothing of it is stored but per-token sums and, for the
gradient, a strip of d loss / d logit in the operands' dtype that a matmul consumes at once (loss.py).

Partial results of several programs over one token are [parts, results, N] and merged in a fixed order: no atomics, so
a result does not change from run to run.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels import launch
from popsd_kernels.device.logits import Stream, floor_logit, stream_gain, temper
from popsd_kernels.device.primitives import LOGIT_FLOOR, NOTHING, lse_accumulate, lse_finish
from popsd_kernels.device.targets import Difference, purified_logit

UPCAST = tl.constexpr(launch.INTERPRETED)
"""The interpreter's tl.dot multiplies the raw bits of bfloat16 (Triton 3.6-3.9), so there operands become float32."""

QUARTERS = tl.constexpr(4)
"""Pieces of a tile that its formulas take one after the other: see `_quarters`."""
LANES = 1024
"""Most parts that the merging kernels read: vocabulary splits times strips."""


class Streams(NamedTuple):
    """What a logit tile is made of. The ``Stream`` and ``Difference`` here hold hidden states, [N, D] or [N, FROZEN_D].

    frozen_ptr: None where the student's head serves every stream.
    """

    student: Stream
    target: Stream
    difference: Difference | None
    offset_ptr: Any
    pmi_beta: Any
    pmi_clip: Any
    weight_ptr: Any
    weight_row_stride: Any
    frozen_ptr: Any
    frozen_row_stride: Any


class Extent(NamedTuple):
    """Tokens, and the vocabulary tiles [first, last) in runs of ``span`` per program.

    Made inside a kernel from plain arguments: Triton specialises integers in a tuple whatever ``do_not_specialize``
    says (3.7.1), and would compile anew for other numbers of tokens.
    """

    tokens: Any
    first: Any
    last: Any
    span: Any


class Parts(NamedTuple):
    """Partial results [parts, results, N] as a kernel argument; both strides are multiples of 16."""

    ptr: Any
    part_stride: Any
    row_stride: Any


@triton.jit
def program_share(extent, BLOCK_M: tl.constexpr):
    """(part, token tile, first and last vocabulary tile): neighbours in launch order read the same tile of W."""
    token_tiles = tl.cdiv(extent.tokens, BLOCK_M)
    part = tl.program_id(0) // token_tiles
    begin = extent.first + part * extent.span
    return part, tl.program_id(0) % token_tiles, begin, tl.minimum(begin + extent.span, extent.last)


@triton.jit
def _block(ptr, row_stride, first, count, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] of a row-major matrix of ``count`` rows, from row ``first`` on; zeros beyond its width.

    Rows beyond the last repeat it: what they yield is never stored, and a clamp needs no mask. The 64-bit part of an
    offset is the tile's, the rest fits 32 bits, which saves spills (pass 1, 64x256 tiles on sm_90: 44 spill instructions
    become 10).
    """
    rows = tl.minimum(tl.arange(0, ROWS), count - 1 - first)
    inner = start + tl.arange(0, BLOCK_D)
    pointers = ptr + tl.cast(first, tl.int64) * row_stride + (rows[:, None] * row_stride + inner[None, :])
    if WIDTH % BLOCK_D == 0:  # noqa: SIM108 -- a constexpr `if`: only one branch exists
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=inner[None, :] < WIDTH, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_offsets(streams, rows):
    if streams.difference is None:
        return 0.0
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return tl.load(streams.offset_ptr + rows)[:, None]


@triton.jit
def project(
    streams,
    tokens,
    token_tile,
    tile,
    V: tl.constexpr,
    D: tl.constexpr,
    FROZEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Raw projections of student, target and difference on one tile, each as the four pieces of `_quarters`."""
    row, word = token_tile * BLOCK_M, tile * BLOCK_V
    student, target, difference = streams.student, streams.target, streams.difference
    s = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    delta = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        w = tl.trans(_block(streams.weight_ptr, streams.weight_row_stride, word, V, start, BLOCK_V, D, BLOCK_D))
        hidden = _block(student.ptr, student.row_stride, row, tokens, start, BLOCK_M, D, BLOCK_D)
        s = tl.dot(hidden, w, s, input_precision="ieee")
        if streams.frozen_ptr is None:
            hidden = _block(target.ptr, target.row_stride, row, tokens, start, BLOCK_M, D, BLOCK_D)
            u = tl.dot(hidden, w, u, input_precision="ieee")
            if difference is not None:
                hidden = _block(difference.ptr, difference.row_stride, row, tokens, start, BLOCK_M, D, BLOCK_D)
                delta = tl.dot(hidden, w, delta, input_precision="ieee")
    if streams.frozen_ptr is not None:
        for start in range(0, FROZEN_D, BLOCK_D):
            w = _block(streams.frozen_ptr, streams.frozen_row_stride, word, V, start, BLOCK_V, FROZEN_D, BLOCK_D)
            w = tl.trans(w)
            hidden = _block(target.ptr, target.row_stride, row, tokens, start, BLOCK_M, FROZEN_D, BLOCK_D)
            u = tl.dot(hidden, w, u, input_precision="ieee")
            if difference is not None:
                hidden = _block(difference.ptr, difference.row_stride, row, tokens, start, BLOCK_M, FROZEN_D, BLOCK_D)
                delta = tl.dot(hidden, w, delta, input_precision="ieee")
    return _quarters(s), _quarters(u), _quarters(delta)


@triton.jit
def _quarters(x):
    """[BLOCK_M, BLOCK_V] -> four [BLOCK_M, BLOCK_V // QUARTERS], by bits 4 and 5 of the column.

    The epilogue takes the quarters one after the other: all at once, its intermediates spill (pass 2 with both clips,
    64x128 tiles, Triton 3.7.1: 327 spill instructions on sm_90, 331 on sm_80; with quarters 0 and 12). On sm_90 those
    bits number a thread's own registers and nothing moves; elsewhere a tile passes through shared memory once, 2 % of
    what its projection moves at D = 4096.
    """
    x = tl.reshape(x, [x.shape[0], x.shape[1] // 64, 2, 2, 16])
    even, odd = tl.split(tl.permute(x, [0, 1, 4, 2, 3]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return _flat(first), _flat(second), _flat(third), _flat(fourth)


@triton.jit
def _flat(x):
    return tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]])


@triton.jit
def quarter_logits(
    streams, projected, tile, offset, QUARTER: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, FAST: tl.constexpr
):
    """A quarter of the tile that `project` made: its vocabulary entries [BLOCK_V // QUARTERS], and tempered, floored logits of
    student and target there; LOGIT_FLOOR beyond the vocabulary."""
    MASKED: tl.constexpr = V % BLOCK_V != 0
    lane = tl.arange(0, BLOCK_V // QUARTERS)
    columns = tile * BLOCK_V + lane // 16 * 64 + QUARTER * 16 + lane % 16
    s, u, delta = projected[0][QUARTER], projected[1][QUARTER], projected[2][QUARTER]
    s = temper(streams.student, s, columns[None, :], V, MASKED, FAST) * stream_gain(streams.student)
    u = temper(streams.target, u, columns[None, :], V, MASKED, FAST) * stream_gain(streams.target)
    if streams.difference is not None:
        gain, pmi_beta = tl.cast(streams.difference.gain, tl.float32), tl.cast(streams.pmi_beta, tl.float32)
        u = purified_logit(u, delta, offset, gain, pmi_beta, streams.pmi_clip, FAST)
    return columns, floor_logit(s, columns[None, :], V, MASKED), floor_logit(u, columns[None, :], V, MASKED)


@triton.jit(do_not_specialize=["tokens", "first", "last", "span"])
def stream_statistics_kernel(
    streams,
    out,
    tokens,
    first,
    last,
    span,
    V: tl.constexpr,
    D: tl.constexpr,
    FROZEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FAST: tl.constexpr,
):
    """Pass 1: (max, sum of exp) of student and target over this program's share of the vocabulary."""
    MASKED: tl.constexpr = V % BLOCK_V != 0
    extent = Extent(tokens, first, last, span)
    part, token_tile, begin, end = program_share(extent, BLOCK_M)
    row = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, tokens - 1)
    offset = load_offsets(streams, rows)
    student_top, student_total = tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    target_top, target_total = tl.full([BLOCK_M], NOTHING, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    width: tl.constexpr = BLOCK_V // QUARTERS
    for tile in range(begin, end):
        projected = project(streams, tokens, token_tile, tile, V, D, FROZEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
        for quarter in tl.static_range(QUARTERS):
            columns, s, u = quarter_logits(streams, projected, tile, offset, quarter, V, BLOCK_V, FAST)
            if MASKED:
                s = tl.where(columns[None, :] < V, s, float("-inf"))
                u = tl.where(columns[None, :] < V, u, float("-inf"))
            # an accumulator per token: a quarter is BLOCK_M runs of ``width`` neighbours
            s, u = tl.reshape(s, [BLOCK_M * width]), tl.reshape(u, [BLOCK_M * width])
            student_top, student_total = lse_accumulate(s, student_top, student_total, width)
            target_top, target_total = lse_accumulate(u, target_top, target_total, width)
    pointers = out.ptr + part.to(tl.int64) * out.part_stride + row
    inside = row < tokens
    tl.store(pointers, student_top, mask=inside)
    tl.store(pointers + out.row_stride, student_total, mask=inside)
    tl.store(pointers + 2 * out.row_stride, target_top, mask=inside)
    tl.store(pointers + 3 * out.row_stride, target_total, mask=inside)


@triton.jit(do_not_specialize=["part_count", "out_row_stride"])
def stream_merge_kernel(
    partial, part_count, out_ptr, out_row_stride, V: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """One program per token: the parts of pass 1 into (max, log-sum) of student and target, [4, N]."""
    row, lanes = tl.program_id(0), tl.arange(0, LANES)
    pointers = partial.ptr + lanes.to(tl.int64) * partial.part_stride + row
    given = lanes < part_count
    for stream in tl.static_range(2):
        top = tl.load(pointers + 2 * stream * partial.row_stride, mask=given, other=LOGIT_FLOOR)
        total = tl.load(pointers + (2 * stream + 1) * partial.row_stride, mask=given, other=0.0)
        row_max, logsum = lse_finish(top, total, V)
        tl.store(out_ptr + 2 * stream * out_row_stride + row, row_max)
        tl.store(out_ptr + (2 * stream + 1) * out_row_stride + row, logsum)
