"""A composed target's logit: the purified one from base and teacher - reference (Eq. 13-17), or a device function's."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels.device.logits import Stream, floor_logit, load_entries, load_logit, load_scaled, stream_gain
from popsd_kernels.device.primitives import fma, soft_clip_linear


class Difference(NamedTuple):
    """Raw teacher - reference projections [C, V] as a kernel argument; times ``gain`` they are logit differences."""

    ptr: Any
    row_stride: Any
    gain: Any


class Pair(NamedTuple):
    """Raw teacher and reference projections [C, V], in place of a `Difference` where a device function composes the target.

    They become logits as the base's do. No field may be None: Triton 3.6 compares no such tuple with None.
    """

    teacher_ptr: Any
    teacher_row_stride: Any
    reference_ptr: Any
    reference_row_stride: Any


class Composition(NamedTuple):
    """How a target is composed, as a kernel argument. function: a device function, compiled in, and its ``numbers``; None is
    the purified target with its two numbers."""

    pmi_beta: Any
    pmi_clip: Any
    function: Any
    numbers: Any


@triton.jit
def purified_logit(base, difference, offset, gain, pmi_beta, pmi_clip, FAST: tl.constexpr, base_gain=1.0):
    """base_gain * base + clip(gain * difference - offset) / pmi_beta, Eq. 14-16, up to a constant of the row.

    The log-normalisers of teacher and reference are constants of the row too: centring removes them, so raw logits do.
    """
    strength = 1.0 / pmi_beta
    if pmi_clip is None:
        shift = fma(difference, gain * strength, -offset * strength)
    else:
        bound = tl.cast(pmi_clip, tl.float32)
        shift = soft_clip_linear(difference, gain, offset, bound, bound * strength, FAST)
    return fma(base, base_gain, shift)


@triton.jit
def load_target_logit(
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
    """A block of target logits but for `target_gain`: ``target``'s own, not floored, or with ``difference`` composed on it
    as base, floored. offset: from `load_offset`."""
    if composition.function is not None:
        base = load_log_prob(target, offset[0], row, columns, V, MASKED, FAST)
        teacher = Stream(
            difference.teacher_ptr, difference.teacher_row_stride, target.bias_ptr, target.gain, target.cap
        )  # fmt: skip
        teacher = load_log_prob(teacher, offset[1], row, columns, V, MASKED, FAST)
        reference = Stream(
            difference.reference_ptr, difference.reference_row_stride, target.bias_ptr, target.gain, target.cap
        )  # fmt: skip
        reference = load_log_prob(reference, offset[2], row, columns, V, MASKED, FAST)
        u = composition.function(base, teacher, reference, *composition.numbers)
        u = floor_logit(u, columns, V, MASKED)
    else:
        u = load_scaled(target, row, columns, V, MASKED, FAST)
        if difference is not None:
            delta = load_entries(difference.ptr, row, difference.row_stride, columns, V, MASKED)
            gain, base_gain = tl.cast(difference.gain, tl.float32), stream_gain(target)
            pmi_beta = tl.cast(composition.pmi_beta, tl.float32)
            u = purified_logit(u, delta, offset, gain, pmi_beta, composition.pmi_clip, FAST, base_gain)
            u = floor_logit(u, columns, V, MASKED)
    return u


@triton.jit
def load_log_prob(stream, log_normaliser, row, columns, V: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr):
    """A block of tempered log-probabilities; LOGIT_FLOOR or so where a token is impossible and beyond the vocabulary."""
    return floor_logit(load_logit(stream, row, columns, V, MASKED, FAST), columns, V, MASKED) - log_normaliser


@triton.jit
def load_offset(offset_ptr, row, composition):
    """What `load_target_logit` takes of a row: the offset of its difference, or three log-normalisers."""
    if composition.function is not None:
        return tl.load(offset_ptr + row * 3), tl.load(offset_ptr + row * 3 + 1), tl.load(offset_ptr + row * 3 + 2)
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return tl.load(offset_ptr + row)


@triton.jit
def arithmetic_mix_logit(base, teacher, reference, share):
    """log((1 - share) π_0 + share π_T) from log-probabilities."""
    share = tl.cast(share, tl.float32)
    base += tl.log(1.0 - share)
    teacher += tl.log(share)
    larger = tl.maximum(base, teacher, propagate_nan=tl.PropagateNan.ALL)
    smaller = tl.minimum(base, teacher, propagate_nan=tl.PropagateNan.ALL)
    return larger + tl.log(1.0 + tl.exp(smaller - larger))


@triton.jit
def target_gain(target, difference):
    """What is left to multiply with after `load_target_logit`."""
    if difference is None:
        return stream_gain(target)
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return 1.0
