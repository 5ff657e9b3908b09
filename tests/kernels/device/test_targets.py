"""The purified logit's device function against the oracle's Eq. 13-17."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import interpreted, oracle_target, small_blocks  # noqa: F401

import triton.language as tl  # isort: skip

from popsd_kernels import RowOptions
from popsd_kernels.device.targets import purified_logit

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _probe(base_ptr, delta_ptr, out_ptr, offset, gain, pmi_beta, pmi_clip, N: tl.constexpr):
    columns = tl.arange(0, N)
    base, delta = tl.load(base_ptr + columns), tl.load(delta_ptr + columns)
    tl.store(out_ptr + columns, purified_logit(base, delta, offset, gain, pmi_beta, pmi_clip, False))


@pytest.mark.parametrize("pmi_clip", [None, 1.0, 10.0])
@pytest.mark.parametrize("pmi_beta", [0.5, 2.0])
@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_purified_logit(pmi_clip, pmi_beta, gain):
    torch.manual_seed(0)
    base, delta = torch.randn(64) * 4, torch.randn(64) * 6
    out = torch.full((64,), float("nan"))
    offset = gain * float(delta.double().mean())
    interpreted(_probe)[(1,)](base, delta, out, offset, gain, pmi_beta, pmi_clip, N=64)
    options = RowOptions(pmi_beta=pmi_beta, pmi_clip=pmi_clip, delta_scale=gain)
    expected = oracle_target(options, base[None], delta[None])[0]
    assert expected.std() > 1
    torch.testing.assert_close(out.double().log_softmax(0), expected, rtol=1e-6, atol=1e-5)


def test_huge_differences_saturate():
    delta = torch.tensor([3e38, -3e38, 1e5, -1e5])
    out = torch.full((4,), float("nan"))
    interpreted(_probe)[(1,)](torch.zeros(4), delta, out, 0.0, 1.0, 1.0, 10.0, N=4)
    assert out.tolist() == [10.0, -10.0, 10.0, -10.0]
