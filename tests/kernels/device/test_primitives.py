"""The device functions of primitives.py, called from one probe kernel in the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_helpers import small_blocks  # noqa: F401

import triton  # isort: skip
import triton.language as tl  # isort: skip

from popsd_kernels import device  # isort: skip

from popsd_kernels.device.primitives import log2, lse_accumulate, lse_finish, reciprocal, soft_clip  # isort: skip
from kernel_helpers import interpreted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _scalar_probe(x_ptr, out_ptr, bound, N: tl.constexpr):
    columns = tl.arange(0, N)
    x = tl.load(x_ptr + columns)
    tl.store(out_ptr + columns, soft_clip(x, bound, False))
    tl.store(out_ptr + N + columns, log2(tl.abs(x) + 1.0, False))
    tl.store(out_ptr + 2 * N + columns, reciprocal(tl.abs(x) + 1.0, False))


def _lse_probe(x_ptr, out_ptr, N: tl.constexpr, VEC: tl.constexpr):
    top = tl.full([N // VEC], -1.0e30, tl.float32)
    total = tl.zeros([N // VEC], tl.float32)
    for block in range(3):
        top, total = lse_accumulate(tl.load(x_ptr + block * N + tl.arange(0, N)), top, total, VEC)
    row_max, logsum = lse_finish(top, total, 3 * N)
    tl.store(out_ptr, row_max)
    tl.store(out_ptr + 1, logsum)


@pytest.mark.parametrize("bound", [0.5, 10.0, 30.0])
def test_soft_clip_log2_reciprocal(bound):
    x = torch.cat([torch.linspace(-40, 40, 510), torch.tensor([float("inf"), float("-inf")])])
    out = torch.full((3, 512), float("nan"))
    interpreted(_scalar_probe)[(1,)](x, out, bound, N=512)
    assert (out[0] - bound * torch.tanh(x.double() / bound)).abs().max() <= 3e-7 * bound
    finite = x.isfinite()
    torch.testing.assert_close(out[1][finite].double(), (x[finite].abs().double() + 1).log2(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out[2].double(), 1 / (x.abs().double() + 1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("vec", [1, 4, 16])
@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_online_log_sum_exp(vec, order):
    """The maximum may come first, last, or in between; -inf entries count as nothing."""
    x = torch.linspace(-90, 90, 384)
    x = {"rising": x, "falling": x.flip(0), "shuffled": x[torch.randperm(384)]}[order].clone()
    x[::5] = float("-inf")
    out = torch.full((2,), float("nan"))
    interpreted(_lse_probe)[(1,)](x, out, N=128, VEC=vec)
    assert out[0] == x.max()
    assert abs(float(out[1].double()) - float((x.double() - x.max().double()).logsumexp(0))) < 3e-7


def test_a_row_of_minus_infinity_is_uniform_and_nan_stays():
    out = torch.full((2,), float("nan"))
    interpreted(_lse_probe)[(1,)](torch.full((384,), float("-inf")), out, N=128, VEC=4)
    assert out[0] == -1e30
    assert abs(float(out[1]) - torch.tensor(384.0).log()) < 1e-6
    x = torch.zeros(384)
    x[200] = float("nan")
    interpreted(_lse_probe)[(1,)](x, out, N=128, VEC=4)
    assert out[1].isnan()


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(ImportError, match=r"need triton>=3\.6; got 3\.4\.0.*impl='torch'"):
        importlib.reload(device)
