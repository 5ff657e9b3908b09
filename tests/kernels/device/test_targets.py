"""The purified logit's device function against the oracle's Eq. 13-17, and sweeps that call a device function of one's own."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import (
    BLOCK,
    Guarded,
    interpreted,
    oracle_config,
    oracle_logits,
    oracle_rows,
    oracle_target,
    poisoned,
    small_blocks,  # noqa: F401
)

import triton.language as tl  # isort: skip

from popsd import oracle
from popsd_kernels import (
    LogitTransform,
    RowOptions,
    Rows,
    row_loss_gradient,
    row_single_read,
    row_split_sweeps,
    row_statistics,
    stream_divergence,
)
from popsd_kernels.device.targets import arithmetic_mix_logit, purified_logit
from popsd_kernels.rows import Composed, Heads

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


@interpreted
def _own(base, teacher, reference, strength, share):
    return base + strength * tl.exp(teacher) - share * reference


TRANSFORMED = RowOptions(inv_temperature=0.8, student=LogitTransform(0.7, 8.0), target=LogitTransform(0.9, 9.0))


def _composed(options, dtype=torch.float32, vocabulary=2 * BLOCK + 3, function=_own, numbers=(2.0, 0.25)):
    """Rows with a device function, and the float64 log-probabilities that it is to see."""
    torch.manual_seed(vocabulary)
    streams = [(torch.randn(3, vocabulary) * 3).to(dtype) for _ in range(4)]
    for x in streams if options.target.softcap is None else ():  # which makes them possible
        x[:, 5:9] = -torch.inf
    bias = None if options.target.softcap is None else torch.randn(vocabulary)
    log_probs = [oracle.log_probs(oracle_logits(x, options.target, bias), oracle_config(options)) for x in streams[1:]]
    normalisers = [oracle_logits(x, options.target, bias) * options.inv_temperature for x in streams[1:]]
    normalisers = torch.stack([x.logsumexp(1) for x in normalisers], dim=1).float()
    composed = Composed(function, numbers, normalisers, torch.empty(3, vocabulary))
    student, base, teacher, reference = streams
    rows = Rows(student, base=base, teacher=teacher, reference=reference, frozen_bias=bias, composed=composed)
    return rows, log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [RowOptions(beta=0.3), TRANSFORMED], ids=["plain", "softcap, bias"])
@pytest.mark.parametrize("sweeps", ["two", "split", "single read"])
def test_sweeps_with_a_device_function(sweeps, options, dtype):
    """A masked tail, impossible tokens, and every number in its place; nothing but the output is written."""
    rows, (base, teacher, reference) = _composed(options, dtype)
    inputs = {name: Guarded(getattr(rows, name)) for name in ("base", "teacher", "reference")}
    rows = rows._replace(**{name: x.view for name, x in inputs.items()})
    gradient, out = poisoned(*rows.student.shape), poisoned(*rows.student.shape)
    if sweeps == "two":
        statistics = row_statistics(rows, options, target_out=out.view)
        found = row_loss_gradient(rows.with_target(out.view), statistics, options, gradient=gradient.view)
        out.assert_intact()
    elif sweeps == "split":
        _, found = row_split_sweeps(rows, options, gradient=gradient.view)
    else:
        found = row_single_read(rows, options, gradient=gradient.view)[1]
    gradient.assert_intact()
    for x in inputs.values():
        x.assert_unchanged()
    possible = base.isfinite()
    target = torch.where(possible, base + 2.0 * teacher.exp() - 0.25 * reference, -torch.inf).log_softmax(1)
    expected = oracle_rows(options, rows.student, target)
    torch.testing.assert_close(found.divergence.double(), expected.divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.view.double(), expected.gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_arithmetic_mixs_device_function(share):
    options = RowOptions()
    rows, (base, teacher, _) = _composed(options, function=arithmetic_mix_logit, numbers=(share,))
    out = poisoned(*rows.student.shape)
    row_statistics(rows, options, target_out=out.view)
    expected = torch.log((1.0 - share) * base.exp() + share * teacher.exp())
    possible = expected.isfinite()
    torch.testing.assert_close(out.view.double()[possible], expected[possible], rtol=1e-6, atol=2e-6)
    assert (out.view[~possible] < -1e29).all() and not possible.all()


def test_wrong_device_functions_are_named():
    options, (rows, _) = RowOptions(), _composed(RowOptions())
    out, statistics = torch.empty_like(rows.student), row_statistics(rows, options, target_out=rows.composed.place)
    wrong = {
        "rows.composed.function must be decorated with triton.jit": rows._replace(
            composed=rows.composed._replace(function=min)
        ),
        r"rows.composed.normalisers must have shape \[3, 3\]": rows._replace(
            composed=rows.composed._replace(normalisers=torch.zeros(3, 2))
        ),
        "rows.composed.normalisers must be contiguous": rows._replace(
            composed=rows.composed._replace(normalisers=torch.zeros(3, 3).t())
        ),
        "rows.composed needs rows.base, rows.teacher and rows.reference": rows._replace(reference=None),
    }
    for message, bad in wrong.items():
        with pytest.raises((ValueError, TypeError), match=f"row_statistics: {message}"):
            row_statistics(bad, options, target_out=out)
    with pytest.raises(
        ValueError, match=r"rows.composed and target_out must be given together, got rows.composed alone"
    ):
        row_statistics(rows, options)
    with pytest.raises(ValueError, match=r"target_out must not share memory with rows.student"):
        row_statistics(rows, options, target_out=rows.student)
    with pytest.raises(ValueError, match=r"row_loss_gradient: rows.composed must be None"):
        row_loss_gradient(rows, statistics, options)
    with pytest.raises(ValueError, match=r"stream_divergence: rows.composed must be None"):
        stream_divergence(rows, Heads(torch.zeros(7, 4)), options)
