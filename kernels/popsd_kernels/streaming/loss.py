"""The streaming path: loss and gradients from hidden states, with no logit in memory. Slower than the chunked path; small.

It passes over the vocabulary two or three times. Each pass is a matmul of every stream with W whose tiles are consumed where
they are made (tiles.py). G is the cost of one [N, V, D] matmul, S the number of streams (3 purified, 2 otherwise):

    1 normalisers                                                          S G
    2 losses, entropies, sum of slopes                                     S G
    3 gradient, strip by strip; strip . W into dH, strip^T . H into dW     S G + 1 G (+ 1 G)

so 10 G with a frozen head and 11 G with a trainable one, against 4 and 5 where logits are stored once; 6 G without a
gradient. Forward KL without clips needs no sum before its gradient: passes 2 and 3 are one, 7 G and 8 G.

Memory beside inputs and outputs: the strip, [N, columns] in the operands' dtype, at most STRIP_BYTES or MIN_STRIP
columns, and a few floats per token. A strip and not a tile: dH += g_tile . W_tile straight from the tile would read and
write BLOCK_M x D floats of dH for every tile, 8 D / BLOCK_V bytes per logit. At D = 4096, BLOCK_V = 256, N = 8192,
V = 151936 that is 159 GB, 37 ms at 4.3 TB/s, thrice the matmul itself (12.9 ms); with 4,096 columns it is 2.3 ms.
Programs may then also split the vocabulary where tokens are few, and dW costs one matmul, where a kernel of its own
would have to project everything again (S G).

Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from popsd_kernels import launch
from popsd_kernels.checks import (
    FLOAT32,
    FLOATING,
    MAX_VOCABULARY,
    check_device,
    check_matrix,
    check_not_minus_student,
    check_target,
    check_vector,
    check_vectors,
    share_memory,
)
from popsd_kernels.device.divergence import FORWARD, mode_of
from popsd_kernels.launch import result_rows
from popsd_kernels.rows import Gradients, Heads, RowLoss, RowOptions, Rows, RowStatistics
from popsd_kernels.streaming import plan
from popsd_kernels.streaming.plan import Call, TileConfig, parts, tile_span
from popsd_kernels.streaming.sums import SUMS, Scaling, Strip
from popsd_kernels.streaming.tiles import LANES, Extent

STRIP_BYTES = 64 * 2**20
MIN_STRIP = 1024
"""Columns of a strip where STRIP_BYTES would allow fewer: dH's read and write, 8 / MIN_STRIP of a strip's bytes each
per hidden dimension, would dominate its matmul."""
_NAME = "stream_divergence"
MAX_STRIDE = 2**22
"""Offsets within a tile are 32-bit: 256 rows of at most this many entries."""
_NO_GRADIENTS = Gradients()


def stream_divergence(
    rows: Rows, heads: Heads, options: RowOptions, gradients: Gradients = _NO_GRADIENTS
) -> tuple[RowStatistics, RowLoss]:
    """Per-token divergence (Eq. 12-18) from hidden states, and its gradients, without logits in memory.

    What `row_statistics` and `row_loss_gradient` compute from the projections, option by option.

    rows: the matrices hold hidden states instead of projections: student [N, D], the others [N, Df]. The rest is as in
        `Rows`; ``offset`` is the centring of inv_temperature * delta_scale * difference . frozen^T (Eq. 14). The difference of
        logits is taken to be linear in hidden states, which it is not under a soft cap of the frozen head.
    heads: student [V, D] in the dtype of ``rows.student``; frozen [V, Df] in that of the other streams. Without a frozen one
        each tile of the student's is loaded once for all streams. All matrices are float32, bfloat16 or float16 and have unit
        inner stride and any row stride. Rows that start at multiples of 16 bytes load as 128-bit vectors.
    gradients: dhidden [N, D] of any of the three dtypes; in another than float32 it costs a float32 buffer of its size, since
        the strips add up in float32. dweight [V, D], dbias [V]: float32. A token with row_scale 0 contributes exactly nothing.
    Returns the normalisers of `row_statistics` and nine [N] float32 tensors in nats. The same inputs on the same device give
    the same bits. Gradients of 16-bit operands are rounded to their dtype before the last matmul. Raises ValueError,
    TypeError or RuntimeError before any launch. Not yet run on a GPU.
    """
    _check_inputs(rows, heads, options)
    _check_gradients(gradients, rows, heads)
    tokens, device = rows.student.shape[0], rows.student.device
    results = result_rows(len(RowLoss._fields), tokens, device)
    if tokens == 0:
        return RowStatistics(*result_rows(len(RowStatistics._fields), 0, device)), RowLoss(*results)
    call = Call(rows, heads, options, launch.fast_instructions(device))
    # without clips the gradient of forward KL needs no sum over the vocabulary
    unclipped = options.entry_clip is None and options.token_clip is None
    one_pass = mode_of(options) == FORWARD.value and unclipped and gradients.wanted
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        backward = _Backward(call, gradients)
        statistics = _statistics(call, device)
        scaling = Scaling(*result_rows(len(Scaling._fields), tokens, device))
        if one_pass:
            strips = backward.strips("sums")
            partial = _partial_results(strips.parts, SUMS, tokens, device)
            # a copy: pointers in a tuple are specialised on alignment, and a slice of the caller's may have any
            scale = None if rows.row_scale is None else scaling.scale_ptr.copy_(rows.row_scale)
            backward.run(strips, statistics, Scaling(None, scale), partial)
        else:
            partial = _sums(call, statistics, device)
        call.finish(statistics, partial, scaling, results).run(device)
        if gradients.wanted and not one_pass:
            backward.run(backward.strips("strip"), statistics, scaling)
    return statistics, RowLoss(*results)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out [I, D] float32 += a [I, K] . b [K, D], accumulated in float32 whatever the operands' common dtype."""
    if out.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(out, a, b, out=out, out_dtype=torch.float32)
    else:  # only GPUs have 16-bit matmuls with a float32 result
        torch.addmm(out, a.float(), b.float(), out=out)


def _statistics(call: Call, device: torch.device) -> RowStatistics:
    config, extent = _whole_vocabulary(call, "statistics", device)
    results = len(RowStatistics._fields)
    partial = _partial_results(triton.cdiv(extent.last, extent.span), results, extent.tokens, device)
    call.statistics(config, extent, partial).run(device)
    merged = result_rows(results, extent.tokens, device)
    call.merge(partial, merged).run(device)
    return RowStatistics(*merged)


def _sums(call: Call, statistics: RowStatistics, device: torch.device) -> torch.Tensor:
    config, extent = _whole_vocabulary(call, "sums", device)
    partial = _partial_results(triton.cdiv(extent.last, extent.span), SUMS, extent.tokens, device)
    call.accumulate(config, extent, statistics, None, parts(partial), None).run(device)
    return partial


def _whole_vocabulary(call: Call, kernel: str, device: torch.device) -> tuple[TileConfig, Extent]:
    config = plan.shipped_config(kernel, call.operand_bytes, device)
    tiles = triton.cdiv(call.vocabulary, config.vocabulary)
    token_tiles = triton.cdiv(call.tokens, config.tokens)
    span = tile_span(token_tiles, tiles, plan.processors(device), LANES)
    return config, Extent(call.tokens, 0, tiles, span)


def _partial_results(count: int, results: int, rows: int, device: torch.device) -> torch.Tensor:
    """[count, results, rows] float32 with rows that start 64-byte aligned."""
    pitch = triton.cdiv(rows, 16) * 16
    return torch.empty(count, results, pitch, dtype=torch.float32, device=device)[:, :, :rows]


class Strips(NamedTuple):
    """The vocabulary's tiles in strips of ``step``, shared out to programs in runs of ``span``; rows: N rounded up."""

    config: TileConfig
    rows: int
    tiles: int
    step: int
    span: int

    @property
    def parts(self) -> int:
        full, rest = divmod(self.tiles, self.step)
        return full * triton.cdiv(self.step, self.span) + triton.cdiv(rest, self.span)


@dataclass(frozen=True)
class _Backward:
    """Pass 3: the gradient strip by strip, each accumulated into the outputs before the next overwrites it."""

    call: Call
    outputs: Gradients

    @property
    def student(self) -> torch.Tensor:
        return self.call.rows.student

    def strips(self, kernel: str) -> Strips:
        """How the vocabulary is cut for a kernel."""
        call, device = self.call, self.student.device
        config = plan.shipped_config(kernel, call.operand_bytes, device)
        tiles, token_tiles = triton.cdiv(call.vocabulary, config.vocabulary), triton.cdiv(call.tokens, config.tokens)
        rows = token_tiles * config.tokens
        most = max(STRIP_BYTES // (rows * self.student.element_size()), MIN_STRIP) // config.vocabulary
        most = max(most, triton.cdiv(tiles, LANES), 1)
        step = triton.cdiv(tiles, triton.cdiv(tiles, most))
        span = tile_span(token_tiles, step, plan.processors(device), LANES // triton.cdiv(tiles, step))
        return Strips(config, rows, tiles, step, span)

    def run(
        self,
        strips: Strips,
        statistics: RowStatistics,
        scaling: Scaling,
        partial: torch.Tensor | None = None,
    ) -> None:
        """Fills the outputs; with ``partial`` [parts, SUMS, N] it is pass 2 as well."""
        config, device, out = strips.config, self.student.device, self.outputs.dhidden
        shape = (strips.rows, strips.step * config.vocabulary)
        gradient = torch.empty(shape, dtype=self.student.dtype, device=device)
        # strips add up in float32: sums of rounded partial results would be biased
        dhidden = out
        if out is not None:
            dhidden = out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)
        hidden = self._hidden()
        for index, first in enumerate(range(0, strips.tiles, strips.step)):
            extent = Extent(self.call.tokens, first, min(first + strips.step, strips.tiles), strips.span)
            sums = None if partial is None else parts(partial[index * triton.cdiv(strips.step, strips.span) :])
            self.call.accumulate(config, extent, statistics, scaling, sums, Strip(gradient, shape[1])).run(device)
            self._consume(config, extent, gradient, dhidden, hidden)
        if out is not None and dhidden is not None and dhidden is not out:
            out.copy_(dhidden)

    def _hidden(self) -> torch.Tensor:
        """The student's rows as dW needs them: 0 . NaN is NaN, and a masked token may hold anything."""
        row_scale = self.call.rows.row_scale
        if self.outputs.dweight is None or row_scale is None:
            return self.student
        return torch.where(row_scale[:, None] != 0, self.student, 0.0)

    def _consume(
        self,
        config: TileConfig,
        extent: Extent,
        gradient: torch.Tensor,
        dhidden: torch.Tensor | None,
        hidden: torch.Tensor,
    ) -> None:
        first, last = extent.first * config.vocabulary, extent.last * config.vocabulary
        words = slice(first, min(last, self.call.vocabulary))
        g = gradient[: extent.tokens, : words.stop - words.start]
        if dhidden is not None:
            add_product(dhidden, g, self.call.heads.student[words])
        if self.outputs.dweight is not None:
            add_product(self.outputs.dweight[words], g.t(), hidden)
        if self.outputs.dbias is not None:
            self.outputs.dbias[words] += g.sum(dim=0, dtype=torch.float32)


def _check_inputs(rows: Rows, heads: Heads, options: RowOptions) -> None:
    check_not_minus_student(_NAME, options)
    check_target(_NAME, rows)
    if rows.composed is not None:
        raise ValueError(
            f"{_NAME}: rows.composed must be None, got a device function; use row_statistics, which takes one"
        )
    frozen = "rows.base" if rows.target is None else "rows.target"
    for name, tensor in (("rows.student", rows.student), ("heads.student", heads.student), (frozen, rows.frozen)):
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(
                f"{_NAME}: {name} must be a matrix of at least one column, got shape {list(tensor.shape)}; "
                "flatten leading dimensions with .reshape(-1, width)"
            )
    check_device(_NAME, "rows.student", rows.student)
    (tokens, width), device, vocabulary = rows.student.shape, rows.student.device, heads.student.shape[0]
    if not 0 < vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"{_NAME}: heads.student must have 1 to {MAX_VOCABULARY} rows, got {vocabulary}; slice it")
    frozen_width, frozen_dtype = rows.frozen.shape[1], (rows.frozen.dtype,)
    head, name = (heads.student, "student") if heads.frozen is None else (heads.frozen, "frozen")
    own, others = (tokens, width), (tokens, frozen_width)
    check_matrix(_NAME, "rows.student", rows.student, own, device, FLOATING, MAX_STRIDE)
    check_matrix(_NAME, "heads.student", heads.student, (vocabulary, width), device, (rows.student.dtype,), MAX_STRIDE)
    check_matrix(_NAME, frozen, rows.frozen, others, device, FLOATING, MAX_STRIDE)
    check_matrix(_NAME, f"heads.{name}", head, (vocabulary, frozen_width), device, frozen_dtype, MAX_STRIDE)
    check_matrix(_NAME, "rows.difference", rows.difference, others, device, frozen_dtype, MAX_STRIDE)
    check_vectors(_NAME, rows, vocabulary)


def _check_gradients(gradients: Gradients, rows: Rows, heads: Heads) -> None:
    student, weight = rows.student, heads.student
    check_matrix(_NAME, "gradients.dhidden", gradients.dhidden, student.shape, student.device, FLOATING, MAX_STRIDE)
    check_matrix(_NAME, "gradients.dweight", gradients.dweight, weight.shape, student.device, FLOAT32, MAX_STRIDE)
    check_vector(_NAME, "gradients.dbias", gradients.dbias, weight.shape[0], student.device, FLOAT32)
    read = [x for x in (student, rows.frozen, rows.difference, weight, heads.frozen) if x is not None]
    for name, out in gradients._asdict().items():
        matrix = out[:, None] if out is not None and out.dim() == 1 else out
        if matrix is not None and any(share_memory(matrix, x) for x in read):
            raise ValueError(
                f"{_NAME}: gradients.{name} shares memory with an input, which is read after it is written; use other memory"
            )
