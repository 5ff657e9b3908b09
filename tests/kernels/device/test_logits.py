"""Projection to logit and its slope, against the oracle's head and autograd through it."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import interpreted, oracle_logits, small_blocks  # noqa: F401

import triton.language as tl  # isort: skip

from popsd_kernels import LogitTransform
from popsd_kernels.device.logits import Stream, floor_logit, load_logit, logit_slope, logit_stream, projection_stream

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _probe(stream, out_ptr, V: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, N)
    z = floor_logit(load_logit(stream, row, columns, V, True, False), columns, V, True)
    tl.store(out_ptr + row * N + columns, z)
    tl.store(out_ptr + (row + tl.num_programs(0)) * N + columns, logit_slope(stream, z))


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("inv_temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logit_and_slope(softcap, inv_temperature, with_bias):
    torch.manual_seed(0)
    raw = (torch.randn(2, 61) * 8).double().requires_grad_()
    bias = torch.randn(61).bfloat16() if with_bias else None
    transform = LogitTransform(1.7, softcap)
    out = torch.full((4, 64), float("nan"))
    interpreted(_probe)[(2,)](
        projection_stream(raw.detach().float(), bias, transform, inv_temperature), out, V=61, N=64
    )
    raw32 = raw.detach().float().double().requires_grad_()
    expected = oracle_logits(raw32, transform, bias) * inv_temperature
    expected.sum().backward()
    torch.testing.assert_close(out[:2, :61].double(), expected.detach(), rtol=3e-7, atol=3e-7 * (softcap or 1.0))
    torch.testing.assert_close(out[2:, :61].double(), raw32.grad, rtol=1e-5, atol=2e-6)
    assert (out[:2, 61:] == -1e30).all(), "beyond the vocabulary is the floor"


def test_minus_infinity_is_floored_and_nan_is_not_hidden():
    raw = torch.tensor([[0.0, float("-inf"), float("nan"), 1.0]])
    out = torch.full((2, 4), float("nan"))
    interpreted(_probe)[(1,)](projection_stream(raw, None, LogitTransform(), 1.0), out, V=4, N=4)
    assert out[0, 1] == -1e30
    assert out[0, 2].isnan()


def test_finished_logits_carry_no_transform():
    assert logit_stream(torch.zeros(2, 3))[1:] == Stream(None, 3, None, None, None)[1:]
