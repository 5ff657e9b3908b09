"""The purified target's logit from the base's logit and the difference of teacher and reference (Eq. 13-17)."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels.device.logits import floor_logit, load_entries, load_scaled, stream_gain
from popsd_kernels.device.primitives import fma, soft_clip_linear


class Difference(NamedTuple):
    """Raw teacher - reference projections [C, V] as a kernel argument; times ``gain`` they are logit differences."""

    ptr: Any
    row_stride: Any
    gain: Any


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
    pmi_beta,
    pmi_clip,
    row,
    columns,
    V: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block of target logits but for `target_gain`: ``target``'s own, not floored, or with ``difference`` composed on it
    as base, floored."""
    u = load_scaled(target, row, columns, V, MASKED, FAST)
    if difference is not None:
        delta = load_entries(difference.ptr, row, difference.row_stride, columns, V, MASKED)
        gain, base_gain = tl.cast(difference.gain, tl.float32), stream_gain(target)
        u = purified_logit(u, delta, offset, gain, tl.cast(pmi_beta, tl.float32), pmi_clip, FAST, base_gain)
        u = floor_logit(u, columns, V, MASKED)
    return u


@triton.jit
def target_gain(target, difference):
    """What is left to multiply with after `load_target_logit`."""
    if difference is None:
        return stream_gain(target)
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return 1.0
