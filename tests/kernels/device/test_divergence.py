"""Entry values and slopes against the oracle, over log ratios from exact agreement to total disagreement."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import interpreted, oracle_config, small_blocks  # noqa: F401  (first: switches the interpreter on)

import triton.language as tl  # isort: skip

from popsd import oracle
from popsd_kernels import RowOptions
from popsd_kernels.device.divergence import (
    FORWARD,
    JENSEN_SHANNON,
    REVERSE,
    combine,
    divergence_mode,
    divergence_terms,
    entry_gradient,
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


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gap", [0.0, 0.03, 1.0, 60.0])
def test_entries_and_gradient(beta, gap):
    """gap: how far log q strays from log p, in bits."""
    torch.manual_seed(0)
    log_p = (torch.randn(256) * 8).log_softmax(0)
    log_q = (log_p + gap * torch.randn(256)).log_softmax(0) if gap else log_p
    bits = [x / torch.tensor(2.0).log() for x in (log_p, log_q)]
    exact = [x.double() * torch.tensor(2.0, dtype=torch.float64).log() for x in bits]
    config = oracle_config(RowOptions(beta=beta))
    one = oracle_config(RowOptions(beta=1.0))
    expected = torch.stack([oracle.divergence(p[None], q[None], config) for p, q in zip(*exact, strict=True)])
    log_m = torch.logaddexp(exact[0] + torch.tensor(1.0 - beta).log(), exact[1] + torch.tensor(beta).log())
    log_m = exact[0] if beta == 0 else exact[1] if beta == 1 else log_m
    slope_sum = {0.0: 0.0, 1.0: 1.0}.get(beta, 1.0 - beta) * float(oracle.divergence(exact[0], log_m, one))
    leaf = exact[0].clone().requires_grad_()
    oracle.divergence(leaf.log_softmax(0), exact[1], config).backward()
    out = torch.full((2, 256), float("nan"))
    interpreted(_probe)[(1,)](*bits, out, beta, slope_sum, N=256, MODE=divergence_mode(beta))
    torch.testing.assert_close(out[0].double(), expected, rtol=2e-5, atol=2e-7)
    assert (out[1].double() - leaf.grad).abs().max() <= 3e-7 * max(1.0, 3 * gap)
    if gap:
        assert max(leaf.grad.norm(), expected.norm()) > 1e-5 or beta == 1e-3, "sharp against the reference's size"


def test_modes():
    assert [divergence_mode(x) for x in (0.0, 1.0, 0.5, 1e-9)] == [
        FORWARD.value, REVERSE.value, JENSEN_SHANNON.value, JENSEN_SHANNON.value,
    ]  # fmt: skip
