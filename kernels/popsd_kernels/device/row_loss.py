"""A row's sums, the nine results that they become, and the gradient of an entry: what every sweep of the loss shares."""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from popsd_kernels.device.divergence import (
    FORWARD,
    RENYI,
    combine,
    divergence_terms,
    entry_gradient,
    is_mixture,
    probability_difference,
    renyi_results,
    renyi_weight,
    slope_factors,
    unclipped_slope_sum,
)
from popsd_kernels.device.logits import load_logit, logit_slope
from popsd_kernels.device.primitives import LN2, LOGIT_FLOOR, lane_max, lane_sum
from popsd_kernels.device.probabilities import exact_logarithms


class Gradient(NamedTuple):
    """The gradient [C, V] as a kernel argument."""

    ptr: Any
    row_stride: Any


class Sums(NamedTuple):
    """Accumulators of a row [BLOCK // VEC]; logarithms are base 2, but for the clipped divergence.

    ``top`` is the largest log p + log q; the last three are used with entry_clip only, but that ``slope`` takes Σ(p − q) too,
    and with RENYI the sum of its weights, where ``student_kl`` is that of `renyi_deficit`.
    """

    student_kl: Any
    target_kl: Any
    student_entropy: Any
    target_entropy: Any
    top: Any
    clipped_divergence: Any
    capped: Any
    slope: Any


@triton.jit
def zero_sums(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return Sums(zero, zero, zero, zero, zero + LOGIT_FLOOR, zero, zero, zero)


@triton.jit
def accumulate(
    sums,
    entries,
    beta,
    entry_clip,
    VEC: tl.constexpr,
    MODE: tl.constexpr,
    FAST: tl.constexpr,
    MINUS_STUDENT: tl.constexpr = False,
):
    """Adds a block to the sums. MINUS_STUDENT: t knows the difference of p and q better than they do, by 1e-7 of it."""
    p, q, difference = entries.p, entries.q, None
    if MINUS_STUDENT and not is_mixture(MODE) and entry_clip is None:
        difference = probability_difference(p, q, entries.t)
        q = p - difference
    student_kl, target_kl = divergence_terms(p, q, entries.t, beta, MODE, FAST)
    clipped_divergence, capped_count, slope = sums.clipped_divergence, sums.capped, sums.slope
    if entry_clip is not None:
        limit = tl.cast(entry_clip, tl.float32)
        f = combine(student_kl, target_kl, beta, MODE) * LN2
        a, r = slope_factors(p, q, entries.t, beta, f > limit, MODE, FAST)
        clipped_divergence += lane_sum(tl.minimum(f, limit, propagate_nan=tl.PropagateNan.ALL), VEC)
        capped_count += lane_sum((f > limit).to(tl.float32), VEC)
        slope += lane_sum(a * r, VEC)
    elif difference is not None:
        slope += lane_sum(difference, VEC)
    elif MODE == RENYI:
        slope += lane_sum(renyi_weight(p, q, entries.t, beta), VEC)
    return Sums(
        sums.student_kl + lane_sum(student_kl, VEC),
        sums.target_kl + lane_sum(target_kl, VEC),
        sums.student_entropy - lane_sum(p * entries.log_p, VEC),
        sums.target_entropy - lane_sum(entries.q * entries.log_q, VEC),
        tl.maximum(sums.top, lane_max(entries.log_p + entries.log_q, VEC)),
        clipped_divergence,
        capped_count,
        slope,
    )


@triton.jit
def finish_row(
    sums,
    student,
    scalars,
    token_ids_ptr,
    out_ptr,
    out_row_stride,
    row,
    row_scale,
    beta,
    entry_clip,
    token_clip,
    V: tl.constexpr,
    MODE: tl.constexpr,
    FAST: tl.constexpr,
    MINUS_STUDENT: tl.constexpr = False,
    token_logit=None,
):
    """Stores the row's nine results; returns (sum of slopes, row_scale or 0 where token_clip capped).

    With ``token_ids_ptr`` every thread reads the sampled token's logit here, unless ``token_logit`` is given. A caller whose
    gradient may lie over the student's rows has stored none of it yet, and stores some only after a barrier; one that
    stores it before gives the `token_logit` that it loaded before that, with a barrier between the two. A launch in which
    another program may store this row's gradient can do neither, and must not have it there.
    """
    student_kl, target_kl = tl.sum(sums.student_kl, axis=0) * LN2, tl.sum(sums.target_kl, axis=0) * LN2
    student_entropy, target_entropy = tl.sum(sums.student_entropy, axis=0), tl.sum(sums.target_entropy, axis=0)
    if not exact_logarithms(MODE, entry_clip):  # what that costs is a factor of each sum
        p_rounding, q_rounding = scalars.student_line.rounding, scalars.target_line.rounding
        target_kl *= tl.exp2(q_rounding)
        student_entropy = tl.exp2(p_rounding) * student_entropy - p_rounding
        target_entropy = tl.exp2(q_rounding) * target_entropy - q_rounding
    slope_sum = unclipped_slope_sum(student_kl, beta, MODE)
    if (
        MINUS_STUDENT and not is_mixture(MODE) and entry_clip is None
    ):  # Σ(p − q) is 0, but for rounding that shows in a KL
        excess = tl.sum(sums.slope, axis=0)
        if MODE == FORWARD:
            target_kl, slope_sum = target_kl + excess, excess
        else:
            student_kl -= excess
    clip_fraction = 0.0
    if MODE == RENYI:
        divergence, slope_sum = renyi_results(student_kl, tl.sum(sums.slope, axis=0), beta, FAST)
        student_kl *= 0.0
    else:
        divergence = combine(student_kl, target_kl, beta, MODE)
    if entry_clip is not None:
        divergence = tl.sum(sums.clipped_divergence, axis=0)
        clip_fraction = tl.sum(sums.capped, axis=0) * (1.0 / V)
        slope_sum = tl.sum(sums.slope, axis=0)
    token_clipped = 0.0
    if token_clip is not None:
        limit = tl.cast(token_clip, tl.float32)
        token_clipped = (divergence > limit).to(tl.float32)
        row_scale = tl.where(divergence > limit, 0.0, row_scale)
        divergence = tl.where(divergence > limit, limit, divergence)
    # log p + log q peaks at the two maxima exactly where they share an entry, up to the rounding of the logits
    log2sums = scalars.student_log2sum + scalars.target_log2sum
    rounding = 2.4e-7 * (tl.abs(scalars.student_max) + tl.abs(scalars.target_max) + log2sums)
    agreement = tl.max(sums.top, axis=0) >= -log2sums - rounding
    token_logprob = float("nan")
    if token_ids_ptr is not None:
        if token_logit is None:
            token_logit = load_token_logit(student, token_ids_ptr, row, V, FAST)
        token_logprob = (token_logit - scalars.student_max) - scalars.student_log2sum * LN2
    out_ptr += row
    tl.store(out_ptr, divergence)
    tl.store(out_ptr + out_row_stride, student_kl)
    tl.store(out_ptr + 2 * out_row_stride, target_kl)
    tl.store(out_ptr + 3 * out_row_stride, student_entropy * LN2)
    tl.store(out_ptr + 4 * out_row_stride, target_entropy * LN2)
    tl.store(out_ptr + 5 * out_row_stride, clip_fraction)
    tl.store(out_ptr + 6 * out_row_stride, token_clipped)
    tl.store(out_ptr + 7 * out_row_stride, agreement.to(tl.float32))
    tl.store(out_ptr + 8 * out_row_stride, token_logprob)
    return slope_sum, row_scale


@triton.jit
def load_token_logit(student, token_ids_ptr, row, V: tl.constexpr, FAST: tl.constexpr):
    """The sampled token's floored logit, NaN where the id is outside the vocabulary."""
    token = tl.load(token_ids_ptr + row)
    known = (token >= 0) & (token < V)
    logit = load_logit(student, row, tl.where(known, token, 0), V, False, FAST)
    return tl.where(known, tl.maximum(logit, LOGIT_FLOOR, propagate_nan=tl.PropagateNan.ALL), float("nan"))


@triton.jit
def store_gradient(
    gradient,
    student,
    entries,
    slope_sum,
    row_scale,
    beta,
    entry_clip,
    row,
    columns,
    V: tl.constexpr,
    MODE: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
    WIDTH: tl.constexpr = None,
):
    """d loss / d raw projection of a block."""
    g = projection_gradient(student, entries, slope_sum, row_scale, beta, entry_clip, MODE, FAST)
    store_block(gradient, row, columns, g, V, MASKED, WIDTH)


@triton.jit
def projection_gradient(
    student, entries, slope_sum, row_scale, beta, entry_clip, MODE: tl.constexpr, FAST: tl.constexpr
):
    """d loss / d raw projection of entries, times ``row_scale``."""
    p, q, t = entries.p, entries.q, entries.t
    capped = None
    if entry_clip is not None:
        student_kl, target_kl = divergence_terms(p, q, t, beta, MODE, FAST)
        capped = combine(student_kl, target_kl, beta, MODE) * LN2 > tl.cast(entry_clip, tl.float32)
    return entry_gradient(p, q, t, beta, capped, slope_sum, MODE, FAST) * (row_scale * logit_slope(student, entries.s))


@triton.jit
def store_block(gradient, row, columns, g, V: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr = None):
    """WIDTH: entries that a thread stores at once. Where 16 bytes hold eight of bfloat16, its float32 loads would be two at a
    stride of 32 bytes, each of which touches half of every sector."""
    pointers = gradient.ptr + row.to(tl.int64) * gradient.row_stride + columns
    if WIDTH is not None:
        pointers = tl.max_contiguous(pointers, WIDTH)
    if MASKED:
        tl.store(pointers, g.to(gradient.ptr.dtype.element_ty), mask=columns < V)
    else:
        tl.store(pointers, g.to(gradient.ptr.dtype.element_ty))
