"""Scalar mathematics of every sweep: one device function per formula.

Two forms of the transcendental instructions live here and nowhere else. ``FAST`` takes the approximate NVIDIA ones
(``lg2.approx``, ``rcp.approx``): one SASS instruction each where the portable ``tl.log2`` costs 27 and ``1 / x`` 8
(Triton 3.6-3.9, sm_90), enough to make the Jensen-Shannon sweep issue bound instead of memory bound. The portable form
serves AMD and the interpreter. ``tl.exp2`` is a single ``ex2.approx.ftz`` on NVIDIA already, so it has one form.

Logits are natural, exponents are base 2: ``exp(x - max)`` is ``exp2((x - max) * LOG2E)``. Subtracting before scaling
costs one multiply more than scaling the logits once, and keeps ``x - max`` exact near the maximum.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations: only constexpr parameters may carry one.
from __future__ import annotations

import math

import triton
import triton.language as tl

from popsd_kernels import options

LOG2E = tl.constexpr(1.0 / math.log(2.0))
LN2 = tl.constexpr(math.log(2.0))
LOGIT_FLOOR = tl.constexpr(options.LOGIT_FLOOR)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2 of a positive normal number; FAST: absolute error 2^-22 on [0.5, 2] (PTX ISA, lg2.approx)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505 -- Triton compiles both branches of a constexpr `if` that ends without an else
        return tl.log2(x)


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
    return bound - 2.0 * bound * reciprocal(tl.exp2(x * (2.0 * LOG2E / bound)) + 1.0, FAST)


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
def lse_fold(x, top, total, VEC: tl.constexpr):
    """One step of the online log-sum-exp. x [BLOCK]; top, total [BLOCK // VEC]: running max and sum of exp(x - top).

    A lane per VEC entries: one rescaling exp2 for VEC new ones, and no exchange between threads inside the loop.
    ``top`` starts at LOGIT_FLOOR, so x = -inf contributes exactly 0 and needs no floor of its own.
    """
    x = tl.reshape(x, [x.shape[0] // VEC, VEC])
    new = tl.maximum(top, tl.max(x, axis=1))
    total = total * tl.exp2((top - new) * LOG2E) + tl.sum(tl.exp2((x - new[:, None]) * LOG2E), axis=1)
    return new, total


@triton.jit
def lse_finish(top, total, COUNT: tl.constexpr):
    """Merges the lanes into (max, log sum exp(x - max)), natural logarithm, scalars.

    A row of COUNT entries that are all -inf is uniform at LOGIT_FLOOR, as flooring each of them would make it.
    """
    row_max = tl.max(top, axis=0)
    row_sum = tl.sum(total * tl.exp2((top - row_max) * LOG2E), axis=0)
    return row_max, tl.log(tl.where(row_sum == 0.0, 1.0 * COUNT, row_sum))
