"""The generalised Jensen-Shannon divergence entry by entry (Eq. 12, 18; arXiv 2306.13649) and its logit gradient.

p student, q target, m = (1 - beta) p + beta q, and everything is a function of p, q and t = log2(q / p):
no probability is ever divided by another, nor is the logarithm of one taken, so nothing underflows into NaN.

With f_v an entry's contribution, capped at ``entry_clip``, and f'_v = d f_v / d log p_v (0 where capped),
    d loss / d s_j = f'_j - p_j * sum_v f'_v.
Adding a multiple of p_v to every f'_v leaves that unchanged since sum_v p_v = 1. Each mode uses it to make the two
terms small, so that float32 subtracts no nearly equal numbers; the shifted f' is called the slope h:
    forward KL   f = q log(q/p)                      f' = -q                h = p - q       capped: p
    reverse KL   f = p log(p/q)                      f' = p (1 - log(q/p))  h = -p log(q/p) capped: -p
    JSD          beta q log(q/m) + (1-beta) p log(p/m)   f' = (1-beta) p log(p/m)  h = f'   capped: 0
Without clipping, sum_v h is 0, KL(p|q) and (1 - beta) KL(p|m) respectively.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import triton
import triton.language as tl

from popsd_kernels.device.primitives import LN2, fma, log2, negative

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)

_LOG_RATIO_CEILING = tl.constexpr(120.0)


def divergence_mode(beta: float) -> int:
    """Which of FORWARD, REVERSE, JENSEN_SHANNON a coefficient means. Only the mode is compiled in."""
    if beta == 0.0:
        return FORWARD.value
    return REVERSE.value if beta == 1.0 else JENSEN_SHANNON.value


@triton.jit
def mixture_log_ratio(t, beta, FAST: tl.constexpr):
    """(t, log2(m / p)) from t = log2(q / p): log2((1 - beta) + beta 2^t), a log-add-exp relative to p.

    t is bounded above so that 2^t stays finite. Beyond the bound p < 2^-120, so p's own term vanishes, and
    log2(m / q) = log2(m / p) - t has long reached log2(beta): no branch on the sign of t is needed. A NaN stays one.
    """
    t = tl.minimum(t, _LOG_RATIO_CEILING, propagate_nan=tl.PropagateNan.ALL)
    return t, log2((1.0 - beta) + beta * tl.exp2(t), FAST)


@triton.jit
def divergence_terms(p, q, t, beta, MODE: tl.constexpr, FAST: tl.constexpr):
    """(p log2(p / m), q log2(q / m)): an entry's share of the two Kullback-Leibler divergences, in bits."""
    if MODE == FORWARD:
        return tl.zeros_like(p), q * t
    elif MODE == REVERSE:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` without an else
        return negative(p) * t, tl.zeros_like(p)
    else:
        t, log_m_over_p = mixture_log_ratio(t, beta, FAST)
        return negative(p) * log_m_over_p, q * (t - log_m_over_p)


@triton.jit
def combine(student_kl, target_kl, beta, MODE: tl.constexpr):
    """beta KL(q|m) + (1 - beta) KL(p|m) from the two parts, whether of an entry or of a token."""
    if MODE == FORWARD:
        return target_kl
    elif MODE == REVERSE:  # noqa: RET505
        return student_kl
    else:
        return beta * target_kl + (1.0 - beta) * student_kl


@triton.jit
def probability_difference(p, q, t):
    """p - q, as p (1 - 2^t) where the two nearly agree.

    The plain difference inherits the rounding of log p and log q, 1e-6 relative each at |log p| = 20; t has 1e-7.
    """
    return tl.where(t > 1.0, p - q, fma(negative(p), tl.exp2(t), p))


@triton.jit
def slope_factors(p, q, t, beta, capped, MODE: tl.constexpr, FAST: tl.constexpr):
    """(a, r) with the slope h = a * r of the table above; ``capped`` is None without entry_clip."""
    if MODE == FORWARD:
        a = probability_difference(p, q, t)
        if capped is not None:
            a = tl.where(capped, p, a)
        return a, 1.0
    elif MODE == REVERSE:  # noqa: RET505
        r = -LN2 * t
        if capped is not None:
            r = tl.where(capped, -1.0, r)
        return p, r
    else:
        t, log_m_over_p = mixture_log_ratio(t, beta, FAST)
        r = ((beta - 1.0) * LN2) * log_m_over_p
        if capped is not None:
            r = tl.where(capped, 0.0, r)
        return p, r


@triton.jit
def unclipped_slope_sum(student_kl, beta, MODE: tl.constexpr):
    """sum_v h where no entry is capped."""
    if MODE == FORWARD:
        return 0.0 * student_kl
    elif MODE == REVERSE:  # noqa: RET505
        return student_kl
    else:
        return (1.0 - beta) * student_kl


@triton.jit
def entry_gradient(p, q, t, beta, capped, slope_sum, MODE: tl.constexpr, FAST: tl.constexpr):
    """d loss / d logit = h_j - p_j * sum_v h_v. slope_sum: None where it is 0, in forward KL without clipping."""
    a, r = slope_factors(p, q, t, beta, capped, MODE, FAST)
    if MODE == FORWARD:
        if slope_sum is None:
            return a
        else:  # noqa: RET505
            return a - p * slope_sum
    else:
        return a * (r - slope_sum)
