"""The streaming path: loss and gradients from hidden states, with no logit in memory. Slower than the chunked path; small.

Passes over the vocabulary, each a product of every stream with W whose tiles are folded where they are made
(streaming_tiles.py); G is the cost of one [N, V, D] product, S the number of streams (3 purified, 2 otherwise):

    1 normalisers                                                          S G
    2 losses, entropies, sum of slopes                                     S G
    3 gradient, strip by strip; strip . W into dH, strip^T . H into dW     S G + 1 G (+ 1 G)

so 10 G with a frozen head and 11 G with a trainable one, against 4 and 5 where logits are stored once; 6 G without a
gradient. Forward KL without clips needs no sum before its gradient: passes 2 and 3 are one, 7 G and 8 G.

Memory beside inputs and outputs: the strip, [N, columns] in the operands' dtype, at most STRIP_BYTES or MIN_STRIP
columns, and a few floats per token. A strip and not a tile: dH += g_tile . W_tile straight from the tile would read and
write BLOCK_M x D floats of dH for every tile, 8 D / BLOCK_V bytes per logit. At D = 4096, BLOCK_V = 256, N = 8192,
V = 151936 that is 159 GB, 37 ms at 4.3 TB/s, thrice the product itself (12.9 ms); with 4,096 columns it is 2.3 ms.
Programs may then also split the vocabulary where tokens are few, and dW costs one product, where a kernel of its own
would have to project everything again (S G).

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from popsd_kernels import launch
from popsd_kernels.checks import FLOATING, MAX_VOCABULARY, check_device, check_not_relative, check_vector
from popsd_kernels.device.divergence import FORWARD, divergence_mode
from popsd_kernels.launch import result_rows
from popsd_kernels.rows import RowLoss, RowOptions, RowStatistics
from popsd_kernels.streaming import plan
from popsd_kernels.streaming.plan import Call, Shape, TileConfig, make_streams, parts, tile_span
from popsd_kernels.streaming.sums import SUMS, Scaling, Strip
from popsd_kernels.streaming.tiles import LANES, Extent

STRIP_BYTES = 64 * 2**20
MIN_STRIP = 1024
"""Columns of a strip where STRIP_BYTES would allow fewer: dH's read and write, 8 / MIN_STRIP of a strip's bytes each
per hidden dimension, would dominate its product."""
_NAME = "stream_divergence"
MAX_STRIDE = 2**22
"""Offsets within a tile are 32-bit: 256 rows of at most this many entries."""


class Outputs(NamedTuple):
    """Gradients to compute; None where not wanted."""

    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None

    @property
    def wanted(self) -> bool:
        return any(tensor is not None for tensor in self)


def stream_divergence(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None = None,
    delta_offset: torch.Tensor | None = None,
    *,
    student_weight: torch.Tensor,
    frozen_weight: torch.Tensor | None = None,
    student_bias: torch.Tensor | None = None,
    target_bias: torch.Tensor | None = None,
    options: RowOptions,
    token_ids: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    dhidden: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
) -> RowLoss:
    """Per-token divergence (Eq. 12-18) from hidden states, and its gradients, without logits in memory.

    What `row_statistics` and `row_loss_gradient` compute from the projections, option by option.

    student: [N, D]. target: [N, Df], the base policy's hidden states where ``delta`` is given, else the target's.
    delta: None, or [N, Df] teacher - reference hidden states. delta_offset: [N] float32, the centring of
        inv_temperature * delta_scale * delta . frozen_weight^T (Eq. 14), with ``delta``. The difference of logits is
        taken to be linear in hidden states: not so under a soft cap of the frozen head.
    student_weight: [V, D], dtype of ``student``. frozen_weight: [V, Df], dtype of ``target`` and ``delta``; None: the
        student's, and each of its tiles is loaded once for all streams. float32, bfloat16 or float16; all matrices have
        unit inner stride and any row stride. Rows that start at multiples of 16 bytes load as 128-bit vectors.
    Biases: [V], contiguous. token_ids: [N] int64; outside [0, V) gives NaN. row_scale: [N] float32, multiplies the
        gradients; where it is 0 the token contributes exactly nothing, whatever its rows hold.
    dhidden: [N, D], overwritten; in another dtype than float32 it costs a float32 buffer of its size, since the strips
        add up in float32. dweight [V, D] and dbias [V], float32, are added to. None: not wanted.
    Returns nine [N] float32 tensors in nats. The same inputs on the same device give the same bits. Gradients of 16-bit
    operands are rounded to their dtype before the last product. Raises ValueError, TypeError or RuntimeError before any
    launch. Not yet run on a GPU.
    """
    check_not_relative(_NAME, options.relative)
    outputs = Outputs(dhidden, dweight, dbias)
    rows, device = _check_inputs(
        student, target, delta, student_weight, frozen_weight, delta_offset, student_bias, target_bias, token_ids,
        row_scale,
    )  # fmt: skip
    read = (student, target, delta, student_weight, frozen_weight)
    _check_outputs(outputs, student, student_weight.shape[0], read)
    results = result_rows(len(RowLoss._fields), rows, device)
    if rows == 0:
        return RowLoss(*results)
    call = Call(
        make_streams(
            student, target, delta, delta_offset, student_weight, frozen_weight, student_bias, target_bias, options
        ),
        Shape(rows, student_weight.shape[0], student.shape[1], target.shape[1]),
        options,
        max(student.element_size(), target.element_size()),
        launch.fast_instructions(device),
    )
    # without clips the gradient of forward KL needs no sum over the vocabulary
    one_pass = divergence_mode(options.beta) == FORWARD.value and options.entry_clip is None is options.token_clip
    one_pass = one_pass and outputs.wanted
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        backward = _Backward(call, student, student_weight, row_scale, outputs)
        statistics = _statistics(call, device)
        scaling = Scaling(*result_rows(2, rows, device))
        if one_pass:
            strips = backward.strips("sums")
            partial = _partial_results(strips.parts, SUMS, rows, device)
            # a copy: pointers in a tuple are specialised on alignment, and a slice of the caller's may have any
            scale = None if row_scale is None else scaling.scale_ptr.copy_(row_scale)
            backward.run(strips, statistics, Scaling(None, scale), token_ids, partial)
        else:
            partial = _sums(call, statistics, token_ids, device)
        call.finish(statistics, partial, token_ids, row_scale, scaling, results).run(device)
        if outputs.wanted and not one_pass:
            backward.run(backward.strips("strip"), statistics, scaling)
    return RowLoss(*results)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out [I, D] float32 += a [I, K] . b [K, D], accumulated in float32 whatever the operands' common dtype."""
    if out.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(out, a, b, out=out, out_dtype=torch.float32)
    else:  # only GPUs have 16-bit products with a float32 result
        torch.addmm(out, a.float(), b.float(), out=out)


def _statistics(call: Call, device: torch.device) -> RowStatistics:
    config, extent = _whole_vocabulary(call, "statistics", device)
    partial = _partial_results(triton.cdiv(extent.last, extent.span), 4, extent.tokens, device)
    call.statistics(config, extent, partial).run(device)
    merged = result_rows(4, extent.tokens, device)
    call.merge(partial, merged).run(device)
    return RowStatistics(*merged)


def _sums(call: Call, statistics: RowStatistics, token_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    config, extent = _whole_vocabulary(call, "sums", device)
    partial = _partial_results(triton.cdiv(extent.last, extent.span), SUMS, extent.tokens, device)
    call.fold(config, extent, statistics, token_ids, None, parts(partial), None).run(device)
    return partial


def _whole_vocabulary(call: Call, kernel: str, device: torch.device) -> tuple[TileConfig, Extent]:
    config = plan.shipped_config(kernel, call.operand_bytes, device)
    tiles = triton.cdiv(call.shape.vocabulary, config.vocabulary)
    token_tiles = triton.cdiv(call.shape.tokens, config.tokens)
    span = tile_span(token_tiles, tiles, plan.processors(device), LANES)
    return config, Extent(call.shape.tokens, 0, tiles, span)


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
    """Pass 3: the gradient strip by strip, each folded into the outputs before the next overwrites it."""

    call: Call
    student: torch.Tensor
    weight: torch.Tensor
    row_scale: torch.Tensor | None
    outputs: Outputs

    def strips(self, kernel: str) -> Strips:
        """How the vocabulary is cut for a kernel."""
        shape, device = self.call.shape, self.student.device
        config = plan.shipped_config(kernel, self.call.operand_bytes, device)
        tiles, token_tiles = triton.cdiv(shape.vocabulary, config.vocabulary), triton.cdiv(shape.tokens, config.tokens)
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
        token_ids: torch.Tensor | None = None,
        partial: torch.Tensor | None = None,
    ) -> None:
        """Fills the outputs; with ``partial`` [parts, SUMS, N] it is pass 2 as well."""
        config, device, out = strips.config, self.student.device, self.outputs.dhidden
        shape = (strips.rows, strips.step * config.vocabulary)
        gradient = torch.empty(shape, dtype=self.student.dtype, device=device)
        # strips add up in float32: sums of rounded partial products would be biased
        dhidden = out
        if out is not None:
            dhidden = out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)
        hidden = self._hidden()
        for index, first in enumerate(range(0, strips.tiles, strips.step)):
            extent = Extent(self.call.shape.tokens, first, min(first + strips.step, strips.tiles), strips.span)
            sums = None if partial is None else parts(partial[index * triton.cdiv(strips.step, strips.span) :])
            self.call.fold(config, extent, statistics, token_ids, scaling, sums, Strip(gradient, shape[1])).run(device)
            self._consume(config, extent, gradient, dhidden, hidden)
        if out is not None and dhidden is not None and dhidden is not out:
            out.copy_(dhidden)

    def _hidden(self) -> torch.Tensor:
        """The student's rows as dW needs them: 0 . NaN is NaN, and a masked token may hold anything."""
        if self.outputs.dweight is None or self.row_scale is None:
            return self.student
        return torch.where(self.row_scale[:, None] != 0, self.student, 0.0)

    def _consume(
        self,
        config: TileConfig,
        extent: Extent,
        gradient: torch.Tensor,
        dhidden: torch.Tensor | None,
        hidden: torch.Tensor,
    ) -> None:
        first, last = extent.first * config.vocabulary, extent.last * config.vocabulary
        words = slice(first, min(last, self.call.shape.vocabulary))
        g = gradient[: extent.tokens, : words.stop - words.start]
        if dhidden is not None:
            add_product(dhidden, g, self.weight[words])
        if self.outputs.dweight is not None:
            add_product(self.outputs.dweight[words], g.t(), hidden)
        if self.outputs.dbias is not None:
            self.outputs.dbias[words] += g.sum(dim=0, dtype=torch.float32)


def _check_inputs(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None,
    student_weight: torch.Tensor,
    frozen_weight: torch.Tensor | None,
    delta_offset: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    target_bias: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    row_scale: torch.Tensor | None,
) -> tuple[int, torch.device]:
    """(N, device), or an error."""
    for name, tensor in (("student", student), ("student_weight", student_weight), ("target", target)):
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(
                f"{_NAME}: {name} must be a matrix of at least one column, got shape {list(tensor.shape)}; "
                "flatten leading dimensions with .reshape(-1, width)"
            )
    check_device(_NAME, "student", student)
    (rows, width), device, vocabulary = student.shape, student.device, student_weight.shape[0]
    if not 0 < vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"{_NAME}: student_weight must have 1 to {MAX_VOCABULARY} rows, got {vocabulary}")
    frozen_width = target.shape[1]
    head, name = (student_weight, "student_weight") if frozen_weight is None else (frozen_weight, "frozen_weight")
    _check_matrix("student", student, (rows, width), device, FLOATING)
    _check_matrix("student_weight", student_weight, (vocabulary, width), device, (student.dtype,))
    _check_matrix("target", target, (rows, frozen_width), device, FLOATING)
    _check_matrix(name, head, (vocabulary, frozen_width), device, (target.dtype,))
    _check_matrix("delta", delta, (rows, frozen_width), device, (target.dtype,))
    if (delta is None) != (delta_offset is None):
        raise ValueError(
            f"{_NAME}: delta and delta_offset must be given together; for two distributions leave both out"
        )
    check_vector(_NAME, "delta_offset", delta_offset, rows, device, (torch.float32,))
    check_vector(_NAME, "student_bias", student_bias, vocabulary, device, FLOATING)
    check_vector(_NAME, "target_bias", target_bias, vocabulary, device, FLOATING)
    check_vector(_NAME, "token_ids", token_ids, rows, device, (torch.int64,))
    check_vector(_NAME, "row_scale", row_scale, rows, device, (torch.float32,))
    return rows, device


def _check_outputs(
    outputs: Outputs,
    student: torch.Tensor,
    vocabulary: int,
    read: Sequence[torch.Tensor | None],
) -> None:
    _check_matrix("dhidden", outputs.dhidden, student.shape, student.device, FLOATING)
    _check_matrix("dweight", outputs.dweight, (vocabulary, student.shape[1]), student.device, (torch.float32,))
    check_vector(_NAME, "dbias", outputs.dbias, vocabulary, student.device, (torch.float32,))
    for name, out in outputs._asdict().items():
        if out is not None and out.numel() and any(x is not None and x.data_ptr() == out.data_ptr() for x in read):
            raise ValueError(f"{_NAME}: {name} shares memory with an input, which is read after it is written")


def _check_matrix(
    name: str,
    tensor: torch.Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        raise ValueError(
            f"{_NAME}: {name} must have shape {list(shape)} on {device}, got {list(tensor.shape)} on {tensor.device}"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{_NAME}: {name} must be {expected}, got {tensor.dtype}; convert it with .to()")
    inner, outer = tensor.stride(1), tensor.stride(0)
    if (tensor.shape[1] > 1 and inner != 1) or (tensor.shape[0] > 1 and not 0 <= outer < MAX_STRIDE):
        raise ValueError(
            f"{_NAME}: {name} must have rows of unit stride less than {MAX_STRIDE} entries apart, got strides "
            f"{tuple(tensor.stride())}; pass .contiguous()"
        )
