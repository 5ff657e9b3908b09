"""From a raw projection to a tempered logit: ``softcap(scale * (raw + bias)) / temperature``, and its derivative."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from popsd_kernels.device.primitives import LOGIT_FLOOR, soft_clip
from popsd_kernels.rows import LogitTransform


class Stream(NamedTuple):
    """One [C, V] tensor as a kernel argument: where its rows are and how an entry becomes a logit.

    The temperature is folded in on the host: with gain = scale / temperature and cap = softcap / temperature,
    cap * tanh(gain * x / cap) = softcap * tanh(scale * x / softcap) / temperature.
    ``gain`` is None where the entries are logits already. ``None`` fields are compile-time switches, floats are not.
    """

    ptr: Any
    row_stride: Any
    bias_ptr: Any
    gain: Any
    cap: Any


def projection_stream(
    tensor: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform, inv_temperature: float
) -> Stream:
    """Raw projections [C, V] that ``transform`` and the temperature turn into logits."""
    cap = None if transform.softcap is None else float(transform.softcap) * float(inv_temperature)
    return Stream(tensor, tensor.stride(0), bias, float(transform.scale) * float(inv_temperature), cap)


def logit_stream(tensor: torch.Tensor) -> Stream:
    """Finished logits [C, V]."""
    return Stream(tensor, tensor.stride(0), None, None, None)


@triton.jit
def load_entries(ptr, row, row_stride, columns, V: tl.constexpr, MASKED: tl.constexpr):
    """Entries of one row as float32; 0 beyond the vocabulary. 64-bit row offset: C * V may pass 2^31."""
    pointers = ptr + row.to(tl.int64) * row_stride + columns
    if MASKED:
        return tl.load(pointers, mask=columns < V, other=0.0).to(tl.float32)
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return tl.load(pointers).to(tl.float32)


@triton.jit
def load_logit(stream, row, columns, V: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr):
    """Tempered logits of one row, not yet floored; beyond the vocabulary (MASKED) the value is unspecified."""
    return load_scaled(stream, row, columns, V, MASKED, FAST) * stream_gain(stream)


@triton.jit
def load_scaled(stream, row, columns, V: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr):
    """As `load_logit` but for `stream_gain`, which costs nothing in a product that comes anyway."""
    x = load_entries(stream.ptr, row, stream.row_stride, columns, V, MASKED)
    return temper(stream, x, columns, V, MASKED, FAST)


@triton.jit
def temper(stream, x, columns, V: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr):
    """Raw projections to tempered logits but for `stream_gain`; ``columns`` broadcasts against x."""
    if stream.bias_ptr is not None:
        if MASKED:
            x += tl.load(stream.bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        else:
            x += tl.load(stream.bias_ptr + columns).to(tl.float32)
    if stream.cap is not None:
        cap = tl.cast(stream.cap, tl.float32)
        x = soft_clip(x * tl.cast(stream.gain, tl.float32), cap, FAST)  # the gain inside would spill in streaming
    return x


@triton.jit
def stream_gain(stream):
    """What is left to multiply with after `temper`, positive; under a soft cap the gain is inside the tanh."""
    if stream.gain is None or stream.cap is not None:
        return 1.0
    else:  # noqa: RET505
        return tl.cast(stream.gain, tl.float32)


@triton.jit
def floor_logit(x, columns, V: tl.constexpr, MASKED: tl.constexpr):
    """-inf becomes LOGIT_FLOOR (NaN stays); entries beyond the vocabulary become LOGIT_FLOOR too."""
    x = tl.maximum(x, LOGIT_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    if MASKED:
        x = tl.where(columns < V, x, LOGIT_FLOOR)
    return x


@triton.jit
def logit_slope(stream, logit):
    """d logit / d raw projection: gain, times 1 - tanh^2 under a soft cap."""
    gain = tl.cast(stream.gain, tl.float32)
    if stream.cap is not None:
        saturation = logit / tl.cast(stream.cap, tl.float32)
        gain = gain * (1.0 - saturation * saturation)
    return gain
