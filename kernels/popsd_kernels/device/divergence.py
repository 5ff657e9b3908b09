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

The Rényi divergence D_α(q|p) = -log(Z) / (1 - α), Z = sum_v w_v, w = q^α p^(1-α), has no contributions of entries, hence no
entry_clip. d D / d s_j = p_j - w_j / Z. Of -log(Z) a float32 sum would leave few digits where p and q nearly agree, so
1 - Z is added up: (1 - α) p + α q - w, is at least 0, is 0 to first order in t, and adds up to 1 - Z.

Where one of the two weights is small, so is a logarithm: log(m/p) near forward KL, log(m/q) near reverse KL. Taken from a
sum near 1, or from the difference of two logarithms, it would lose as many digits as the weight has zeros (loss off by 7e-5
at beta = 0.01, by 9e-3 at 1e-4). Two modes of their own take it from log(1 + x); JENSEN_SHANNON has no instructions left.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import triton
import triton.language as tl

from popsd_kernels.device.primitives import LN2, LOG2E, fma, log2, log2_one_plus, negative
from popsd_kernels.rows import RowOptions

FORWARD = tl.constexpr(0)
REVERSE = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)
SMALL_BETA = tl.constexpr(3)
LARGE_BETA = tl.constexpr(4)
RENYI = tl.constexpr(5)

LOPSIDED = 0.125
"""The smaller of the weights beta and 1 - beta below which a mixture is taken as SMALL_BETA or LARGE_BETA."""

_LOG_RATIO_CEILING = tl.constexpr(120.0)


def mode_of(options: RowOptions) -> int:
    """The mode of a sweep. Raises ValueError for a Rényi divergence with entry_clip."""
    if options.renyi is None:
        return divergence_mode(options.beta)
    if options.entry_clip is not None:
        raise ValueError(f"options.entry_clip: expected None with renyi={options.renyi}; got {options.entry_clip}.")
    return RENYI.value


def coefficient_of(options: RowOptions) -> float:
    """What a kernel takes as ``beta``: α in RENYI, else `kernel_beta`."""
    return kernel_beta(options.beta) if options.renyi is None else float(options.renyi)


def divergence_mode(beta: float) -> int:
    """Which of the five modes of a JSD a coefficient means. Only the mode is compiled in."""
    if beta == 0.0:
        return FORWARD.value
    if beta == 1.0:
        return REVERSE.value
    if min(beta, 1.0 - beta) >= LOPSIDED:
        return JENSEN_SHANNON.value
    return SMALL_BETA.value if beta < 0.5 else LARGE_BETA.value


def kernel_beta(beta: float) -> float:
    """What a kernel takes as ``beta``: 1 - beta in LARGE_BETA, where float32 would leave few digits of the difference."""
    return 1.0 - float(beta) if divergence_mode(beta) == LARGE_BETA.value else float(beta)


@triton.constexpr_function
def is_mixture(mode):
    """Whether it is neither KL alone, whose sums need care where student and target nearly agree."""
    return mode not in (FORWARD.value, REVERSE.value)


@triton.jit
def mixture_weights(beta, MODE: tl.constexpr):
    """(weight of the target, weight of the student) in the mixture: beta and 1 - beta, from `kernel_beta`."""
    if MODE == LARGE_BETA:
        return 1.0 - beta, beta
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return beta, 1.0 - beta


@triton.jit
def mixture_log_ratios(t, beta, MODE: tl.constexpr, FAST: tl.constexpr):
    """(log2(m / p), log2(q / m)) from t = log2(q / p): m / p is (1 - beta) + beta 2^t, m / q is beta + (1 - beta) 2^-t.

    The exponent is bounded above so that its power stays finite. Beyond the bound p < 2^-120 (LARGE_BETA: q), so its own
    term vanishes, and the other logarithm has long reached that of a weight: no branch on the sign of t is needed. A NaN
    stays one.
    """
    if MODE == LARGE_BETA:
        t = tl.maximum(t, -_LOG_RATIO_CEILING, propagate_nan=tl.PropagateNan.ALL)
        log_m_over_q = log2_one_plus(fma(beta, tl.exp2(negative(t)), negative(beta)), FAST)
        return log_m_over_q + t, negative(log_m_over_q)
    else:  # noqa: RET505
        t = tl.minimum(t, _LOG_RATIO_CEILING, propagate_nan=tl.PropagateNan.ALL)
        if MODE == SMALL_BETA:
            log_m_over_p = log2_one_plus(fma(beta, tl.exp2(t), negative(beta)), FAST)
        else:
            log_m_over_p = log2((1.0 - beta) + beta * tl.exp2(t), FAST)
        return log_m_over_p, t - log_m_over_p


@triton.jit
def renyi_weight(p, q, t, alpha):
    """w = q^alpha p^(1 - alpha)."""
    of, ratio = renyi_factors(p, q, t, alpha, 0.0)
    return of * ratio


@triton.jit
def renyi_factors(p, q, t, alpha, log_z):
    """Two factors of w / Z, log_z = log2(Z). From the larger of p and q where they differ: the other may have underflowed."""
    above = t > 1.0
    return tl.where(above, q, p), tl.exp2(fma(tl.where(above, alpha - 1.0, alpha), t, negative(log_z)))


@triton.jit
def renyi_deficit(p, q, t, alpha):
    """(1 - alpha) p + alpha q - w, whose sum is 1 - Z. Up to |x| = 1, x = log(q / p), by its series p sum_k
    (alpha - alpha^k) x^k / k!, which loses no digits; what comes after x^9 is below 3e-6 of it."""
    s3 = 1.0 + alpha
    s4 = 1.0 + alpha * s3
    s5 = 1.0 + alpha * s4
    s6 = 1.0 + alpha * s5
    s7 = 1.0 + alpha * s6
    s8 = 1.0 + alpha * s7
    s9 = 1.0 + alpha * s8
    x = t * LN2
    tail = fma(x, fma(x, s9 * (1.0 / 362880.0), s8 * (1.0 / 40320.0)), s7 * (1.0 / 5040.0))
    tail = fma(x, fma(x, fma(x, tail, s6 * (1.0 / 720.0)), s5 * (1.0 / 120.0)), s4 * (1.0 / 24.0))
    series = fma(x, fma(x, tail, s3 * (1.0 / 6.0)), 0.5) * (x * x) * (alpha * (1.0 - alpha))
    direct = alpha * (q - p) - (renyi_weight(p, q, t, alpha) - p)
    return tl.where(tl.abs(x) < 1.0, p * series, direct)


@triton.jit
def renyi_results(deficit, weight, alpha, FAST: tl.constexpr):
    """(divergence, log2(Z)) from the sums of `renyi_deficit` and `renyi_weight`; the better of the two counts."""
    near = deficit < 0.5
    logarithm = tl.where(near, log2_one_plus(negative(tl.where(near, deficit, 0.0)), FAST), tl.log2(weight))
    return logarithm * (-LN2 / (1.0 - alpha)), tl.maximum(
        logarithm, -_LOG_RATIO_CEILING, propagate_nan=tl.PropagateNan.ALL
    )


@triton.jit
def divergence_terms(p, q, t, beta, MODE: tl.constexpr, FAST: tl.constexpr):
    """(p log2(p / m), q log2(q / m)): an entry's share of the two Kullback-Leibler divergences, in bits.

    RENYI: (`renyi_deficit` / ln 2, q log2(q / p)).
    """
    if MODE == FORWARD:
        return tl.zeros_like(p), q * t
    elif MODE == RENYI:  # noqa: RET505
        return renyi_deficit(p, q, t, beta) * LOG2E, q * t
    elif MODE == REVERSE:
        return negative(p) * t, tl.zeros_like(p)
    else:
        log_m_over_p, log_q_over_m = mixture_log_ratios(t, beta, MODE, FAST)
        return negative(p) * log_m_over_p, q * log_q_over_m


@triton.jit
def combine(student_kl, target_kl, beta, MODE: tl.constexpr):
    """beta KL(q|m) + (1 - beta) KL(p|m) from the two parts, whether of an entry or of a token."""
    if MODE == FORWARD:
        return target_kl
    elif MODE == REVERSE:  # noqa: RET505
        return student_kl
    else:
        target_weight, student_weight = mixture_weights(beta, MODE)
        return target_weight * target_kl + student_weight * student_kl


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
        log_m_over_p, _ = mixture_log_ratios(t, beta, MODE, FAST)
        _, student_weight = mixture_weights(beta, MODE)
        r = (student_weight * -LN2) * log_m_over_p
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
        _, student_weight = mixture_weights(beta, MODE)
        return student_weight * student_kl


@triton.jit
def entry_gradient(p, q, t, beta, capped, slope_sum, MODE: tl.constexpr, FAST: tl.constexpr):
    """d loss / d logit = h_j - p_j * sum_v h_v. slope_sum: None where it is 0, in forward KL without clipping.

    RENYI: p - w / Z, rounded once, with log2(Z) as slope_sum.
    """
    if MODE == RENYI:
        of, ratio = renyi_factors(p, q, t, beta, slope_sum)
        return fma(negative(of), ratio, p)
    else:  # noqa: RET505
        return _slope_gradient(p, q, t, beta, capped, slope_sum, MODE, FAST)


@triton.jit
def _slope_gradient(p, q, t, beta, capped, slope_sum, MODE: tl.constexpr, FAST: tl.constexpr):
    a, r = slope_factors(p, q, t, beta, capped, MODE, FAST)
    if MODE == FORWARD:
        if slope_sum is None:
            return a
        else:  # noqa: RET505
            return a - p * slope_sum
    else:
        return a * (r - slope_sum)
