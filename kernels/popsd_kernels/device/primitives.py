"""Scalar mathematics of every sweep: one device function per formula.

Two forms of the transcendental instructions live here and nowhere else. ``FAST`` takes the approximate NVIDIA ones
(``lg2.approx``, ``rcp.approx``): one SASS instruction each where the portable ``tl.log2`` costs 27 and ``1 / x`` 8
(Triton 3.6-3.9, sm_90), enough to make the Jensen-Shannon sweep issue bound instead of memory bound. The portable form
serves AMD and the interpreter. ``tl.exp2`` is a single ``ex2.approx.ftz`` on NVIDIA already, so it has one form.

Logits are natural, exponents are base 2: ``exp(x - max)`` is ``exp2(fma(x, LOG2E, -origin))`` with ``origin`` the rounded
``max * LOG2E``. The product is not rounded, so what is left is the rounding of ``origin``, a factor common to the row,
which `lse_finish` takes out again.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import math

import triton
import triton.language as tl

from popsd_kernels import rows

LOG2E = tl.constexpr(1.0 / math.log(2.0))
LN2 = tl.constexpr(math.log(2.0))
LOGIT_FLOOR = tl.constexpr(rows.LOGIT_FLOOR)
NOTHING = tl.constexpr(1e-6 * rows.LOGIT_FLOOR)
"""Where a running maximum starts: below any logit, and so far above LOGIT_FLOOR, whatever scale or temperature that went
through, that an impossible entry adds exactly 0 to the sum beside it."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fma(x, y, z):
    """x * y + z in float32, rounded once; the interpreter's own fma rounds the product as well."""
    if INTERPRETED:
        x, y, z = tl.cast(x, tl.float32), tl.cast(y, tl.float32), tl.cast(z, tl.float32)
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return tl.fma(x, y, z)


@triton.jit
def negative(x):
    """-x as a modifier of the instruction that reads it. Triton's own minus subtracts from +0, which is one of its own."""
    return x * -1.0


@triton.jit
def rounded_product(x, y):
    """x * y, rounded: adding 0 keeps the compiler from fusing the product into what follows."""
    return fma(x, y, 0.0)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2 of a positive normal number; FAST: absolute error 2^-22 on [0.5, 2] (PTX ISA, lg2.approx)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return tl.log2(x)


@triton.jit
def log2_one_plus(x, FAST: tl.constexpr):
    """log2(1 + x) of x > -1, to 5e-7 of itself however small x is, where log2 of the rounded 1 + x has an absolute error.

    |x| <= 1/4: 2 / ln 2 * artanh(z), z = x / (2 + x), as z + z^3/3 + z^5/5 + z^7/7, whose rest is below 3e-9 of it.
    """
    z = x * reciprocal(x + 2.0, FAST)
    square = z * z
    series = fma(square, fma(square, fma(square, 1.0 / 7.0, 1.0 / 5.0), 1.0 / 3.0), 1.0) * (z * (2.0 * LOG2E))
    return tl.where(tl.abs(x) <= 0.25, series, log2(x + 1.0, FAST))


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x, 0 at infinity; FAST: 1 ulp (PTX ISA, rcp.approx)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return 1.0 / x


@triton.jit
def soft_clip(x, bound, FAST: tl.constexpr):
    """bound * tanh(x / bound) (Eq. 15; also a head's soft cap), absolute error 2e-7 * bound, saturating without NaN.

    As 1 - 2 / (exp(2x) + 1): two special-function instructions. ``tanh.approx`` would be one, but its 2^-11 is too
    coarse for a logit, and libdevice's tanh is 22 instructions.
    """
    return soft_clip_linear(x, 1.0, 0.0, bound, bound, FAST)


@triton.jit
def soft_clip_linear(x, gain, offset, bound, limit, FAST: tl.constexpr):
    """limit * tanh((gain * x - offset) / bound): scale and shift cost nothing beside the tanh."""
    k = 2.0 * LOG2E / bound
    return fma(reciprocal(tl.exp2(fma(x, gain * k, -offset * k)) + 1.0, FAST), -2.0 * limit, limit)


@triton.jit
def lane_sum(x, VEC: tl.constexpr):
    """[BLOCK] -> [BLOCK // VEC]: neighbours are summed inside a thread, so a row sum needs a lane per VEC entries."""
    if VEC == 1:
        return x
    else:  # noqa: RET505
        return tl.sum(tl.reshape(x, [x.shape[0] // VEC, VEC]), axis=1)


@triton.jit
def lane_max(x, VEC: tl.constexpr):
    """[BLOCK] -> [BLOCK // VEC], as `lane_sum`."""
    if VEC == 1:
        return x
    else:  # noqa: RET505
        return tl.max(tl.reshape(x, [x.shape[0] // VEC, VEC]), axis=1)


@triton.jit
def lse_accumulate(x, top, total, VEC: tl.constexpr, gain=1.0):
    """One step of the online log-sum-exp of the logits gain * x, gain > 0. x [BLOCK]; top, total [BLOCK // VEC]: running
    max of x, and sum of exp2(x * unit - top * unit) with unit = gain * LOG2E and the rounded product top * unit.

    A lane per VEC entries: one rescaling exp2 for VEC new ones, and no exchange between threads inside the loop.
    ``top`` starts at NOTHING, so x = -inf contributes exactly 0 and needs no floor of its own.
    """
    unit = gain * LOG2E
    x = tl.reshape(x, [x.shape[0] // VEC, VEC])
    new = tl.maximum(top, tl.max(x, axis=1))
    origin = rounded_product(new, unit)
    total = total * tl.exp2(rounded_product(top, unit) - origin) + tl.sum(
        tl.exp2(fma(x, unit, negative(origin)[:, None])), axis=1
    )
    return new, total


@triton.jit
def lse_accumulate_sum(x, step, top, total, VEC: tl.constexpr, gain, step_gain):
    """`lse_accumulate` of gain * x + step_gain * step, which is rounded for ``top`` alone: the exponents take the two apart,
    since a step of 0.04 beside a logit of 100 would be off by 1e-4 of itself."""
    sums = tl.reshape(fma(x, gain, step * step_gain), [x.shape[0] // VEC, VEC])
    new = tl.maximum(top, tl.max(sums, axis=1))
    origin = rounded_product(new, LOG2E)
    exponents = fma(tl.reshape(x, sums.shape), gain * LOG2E, negative(origin)[:, None])
    exponents = fma(tl.reshape(step, sums.shape), step_gain * LOG2E, exponents)
    total = total * tl.exp2(rounded_product(top, LOG2E) - origin) + tl.sum(tl.exp2(exponents), axis=1)
    return new, total


@triton.jit
def lse_finish(top, total, COUNT: tl.constexpr, gain=None):
    """Merges the lanes into (max, log sum exp(gain * x - max)), natural logarithm, scalars. gain: None is 1.

    A row of COUNT entries that are all -inf is uniform at LOGIT_FLOOR, as flooring each of them would make it.
    """
    unit, row_top = LOG2E if gain is None else gain * LOG2E, tl.max(top, axis=0)
    origin = rounded_product(row_top, unit)
    row_sum = tl.sum(total * tl.exp2(rounded_product(top, unit) - origin), axis=0)
    impossible = row_sum == 0.0
    row_max = tl.where(impossible, LOGIT_FLOOR, row_top if gain is None else row_top * gain)
    # the largest entry's own summand: where it is the whole sum, their quotient is 1 to the last bit
    peak = fma(row_top, unit, -origin)
    logsum = tl.log(tl.where(impossible, 1.0 * COUNT, row_sum / tl.exp2(peak)))
    if gain is not None:
        # that of row_max, not of the exponents: their unit is rounded too, by 3e-3 at a logit of 5e4 under a gain of 1.7
        logsum += tl.where(impossible, 0.0, fma(row_top, gain, negative(row_max)))
    return row_max, logsum
