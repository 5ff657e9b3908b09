"""Entry values and slopes against the oracle, over log ratios from exact agreement to total disagreement."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import interpreted, oracle_config, small_blocks  # noqa: F401

import triton.language as tl  # isort: skip

from popsd import oracle
from popsd_kernels import RowOptions
from popsd_kernels.device.divergence import (
    FORWARD,
    JENSEN_SHANNON,
    LARGE_BETA,
    LOPSIDED,
    REVERSE,
    SMALL_BETA,
    combine,
    divergence_mode,
    divergence_terms,
    entry_gradient,
    kernel_beta,
)
from popsd_kernels.device.primitives import LN2

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _probe(log_p_ptr, log_q_ptr, out_ptr, beta, slope_sum, N: tl.constexpr, MODE: tl.constexpr):
    columns = tl.arange(0, N)
    log_p, log_q = tl.load(log_p_ptr + columns), tl.load(log_q_ptr + columns)
    p, q, t = tl.exp2(log_p), tl.exp2(log_q), log_q - log_p
    student, target = divergence_terms(p, q, t, beta, MODE, False)
    tl.store(out_ptr + columns, combine(student, target, beta, MODE) * LN2)
    tl.store(out_ptr + N + columns, entry_gradient(p, q, t, beta, None, slope_sum, MODE, False))


BETAS = [0.0, 1e-7, 1e-5, 1e-3, 0.1, LOPSIDED, 0.5, 0.8, 1 - 1e-3, 1 - 1e-5, 1.0]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gap", [0.0, 0.03, 1.0, 60.0])
def test_entries_and_gradient(beta, gap):
    """gap: how far log q strays from log p, in bits. Errors are held against the smaller weight, which is the loss's size."""
    torch.manual_seed(0)
    log_p = (torch.randn(256) * 8).log_softmax(0)
    log_q = (log_p + gap * torch.randn(256)).log_softmax(0) if gap else log_p
    bits = [x / torch.tensor(2.0).log() for x in (log_p, log_q)]
    exact = [x.double() * math.log(2.0) for x in bits]
    config = oracle_config(RowOptions(beta=beta))
    one = oracle_config(RowOptions(beta=1.0))
    expected = torch.stack([oracle.divergence(p[None], q[None], config) for p, q in zip(*exact, strict=True)])
    slope_sum, size = beta, 1.0
    if 0.0 < beta < 1.0:
        log_m = torch.logaddexp(exact[0] + math.log1p(-beta), exact[1] + math.log(beta))
        slope_sum, size = (
            (1.0 - beta) * float(oracle.divergence(exact[0], log_m, one)),
            min(1.0, 4 * beta, 4 - 4 * beta),
        )
    elif beta == 1.0:
        slope_sum = float(oracle.divergence(*exact, one))
    leaf = exact[0].clone().requires_grad_()
    oracle.divergence(leaf.log_softmax(0), exact[1], config).backward()
    out = torch.full((2, 256), float("nan"))
    interpreted(_probe)[(1,)](*bits, out, kernel_beta(beta), slope_sum, N=256, MODE=divergence_mode(beta))
    torch.testing.assert_close(out[0].double(), expected, rtol=2e-5, atol=2e-7 * size)
    assert (out[1].double() - leaf.grad).abs().max() <= 3e-7 * size * max(1.0, 3 * gap)
    if gap:
        assert max(leaf.grad.norm(), expected.norm()) > 1e-5 * size, "sharp against the reference's size"


def test_modes():
    modes = {0.0: FORWARD, 1.0: REVERSE, 0.5: JENSEN_SHANNON, LOPSIDED: JENSEN_SHANNON, 1 - LOPSIDED: JENSEN_SHANNON}
    modes |= {1e-9: SMALL_BETA, 0.12: SMALL_BETA, 0.88: LARGE_BETA, 1 - 1e-9: LARGE_BETA}
    assert {beta: divergence_mode(beta) for beta in modes} == {beta: mode.value for beta, mode in modes.items()}
    assert [kernel_beta(beta) for beta in (0.0, 1e-9, 0.5, 1.0, 1 - 2.0**-30)] == [0.0, 1e-9, 0.5, 1.0, 2.0**-30]
