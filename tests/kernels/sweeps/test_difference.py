"""The general difference of teacher and reference in the interpreter against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import (
    BLOCK,
    DTYPES,
    Guarded,
    oracle_config,
    oracle_logits,
    poisoned,
    relative_error,
    rows_of,
    small_blocks,  # noqa: F401
)

from popsd import oracle
from popsd_kernels import LogitTransform, RowOptions, Rows, logit_difference, row_statistics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = RowOptions(inv_temperature=0.8, target=LogitTransform(1.3, 12.0), pmi_beta=0.5)
NO_CAP = replace(OPTIONS, target=LogitTransform(1.3))


def _pair(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(rows * vocabulary)
    teacher = torch.randn(rows, vocabulary) * 4 + 3
    return [x.to(dtype) for x in (teacher, teacher + torch.randn(rows, vocabulary))]


def _difference(teacher, reference, out, bias=None, *, options, center) -> torch.Tensor:
    rows = Rows(teacher, teacher=teacher, reference=reference, frozen_bias=bias)
    return logit_difference(rows, options, center=center, out=out)


def _centred_delta(options: RowOptions, teacher, reference, center: bool, bias=None) -> torch.Tensor:
    """Eq. 13, 14 through the oracle: a flat base, no soft clip, pmi_beta 1; rows up to a constant where centred."""
    config = replace(oracle_config(options, center), pmi_clip=None, pmi_beta=1.0)
    logits = [oracle_logits(x.nan_to_num(neginf=0.0), options.target, bias) for x in (teacher, reference)]
    logits = [
        z.masked_fill(x == float("-inf"), float("-inf")) for z, x in zip(logits, (teacher, reference), strict=True)
    ]
    flat = torch.zeros_like(logits[0])
    return oracle.purified_target_logits(flat, *logits, config) - oracle.log_probs(flat, config)


SHAPES = [
    (NO_CAP, (1, 1)),
    (NO_CAP, (1, 97)),
    (NO_CAP, (2, BLOCK)),
    *((o, (3, 2 * BLOCK + 1)) for o in (OPTIONS, NO_CAP)),
]
"""One entry; a tail alone; full blocks alone; two full blocks and a tail of one entry, in several rows."""


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("options", "shape"), SHAPES)
def test_difference_and_offset(shape, options, center):
    pair = [Guarded(x) for x in _pair(*shape)]
    out = poisoned(*shape)
    offset = _difference(*(x.view for x in pair), out.view, options=options, center=center)
    for x in pair:
        x.assert_unchanged()
    out.assert_intact()
    expected = _centred_delta(options, pair[0].values, pair[1].values, center)
    found = options.inv_temperature * out.view.double() - offset.double()[:, None]
    assert (found - expected).abs().max() < 1e-5
    if shape[1] > 1:
        assert expected.std() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_bias(dtype):
    pair = _pair(2, 300, dtype)
    bias = torch.randn(300).to(dtype)
    out = torch.empty(2, 300)
    offset = _difference(*pair, out, bias, options=OPTIONS, center=True)
    expected = _centred_delta(OPTIONS, *pair, True, bias)
    assert relative_error(OPTIONS.inv_temperature * out - offset[:, None], expected) < 1e-5


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outside_the_support_there_is_no_signal(center, dtype):
    teacher, reference = _pair(3, 300, dtype)
    teacher[0, ::7], reference[0, 3], reference[1, -1] = float("-inf"), float("-inf"), float("-inf")
    out = poisoned(3, 300)
    offset = _difference(teacher, reference, out.view, options=NO_CAP, center=center)
    out.assert_intact()
    found = NO_CAP.inv_temperature * out.view.double() - offset.double()[:, None]
    outside = (teacher == float("-inf")) | (reference == float("-inf"))
    assert found[outside].abs().max() < 1e-6
    assert (found - _centred_delta(NO_CAP, teacher, reference, center)).abs().max() < 1e-5
    target = torch.empty(3, 300)
    base = torch.randn(3, 300)
    rows = rows_of(base, base, out.view, offset)
    row_statistics(rows, replace(NO_CAP, target=LogitTransform()), target_out=target)
    config = oracle_config(NO_CAP, center)
    logits = [oracle_logits(x.nan_to_num(neginf=0.0), NO_CAP.target) for x in (teacher, reference)]
    logits = [z.masked_fill(x == float("-inf"), x.min()) for z, x in zip(logits, (teacher, reference), strict=True)]
    expected = oracle.purified_target_logits(base, *logits, config)
    assert (target.log_softmax(1) - expected.log_softmax(1)).abs().max() < 1e-5


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("other", [0.0, float("-inf")])
def test_nan_is_not_taken_for_a_missing_entry(center, other):
    teacher, reference = _pair(3, 300)
    expected = _difference(teacher, reference, torch.empty(3, 300), options=NO_CAP, center=center)[2]
    teacher[0, 5], reference[0, 5] = float("nan"), other
    teacher[1, 299], reference[1, 299] = other, float("nan")
    out = torch.empty(3, 300)
    offset = _difference(teacher, reference, out, options=NO_CAP, center=center)
    assert offset[:2].isnan().all() and out[0, 5].isnan() and out[1, 299].isnan()
    torch.testing.assert_close(offset[2], expected, rtol=1e-6, atol=1e-7)
    assert out[2].isfinite().all()


@pytest.mark.parametrize("alias", [0, 1])
def test_out_may_be_an_input(alias):
    pair = _pair(2, 300)
    pair[0][1, 7] = float("-inf")
    apart = torch.empty(2, 300)
    expected = _difference(*pair, apart, options=NO_CAP, center=True)
    found = _difference(*pair, pair[alias], options=NO_CAP, center=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pair[alias], apart, rtol=1e-6, atol=1e-6)


def test_refusals():
    pair = _pair(2, 8)
    with pytest.raises(TypeError, match=r"out must be torch\.float32"):
        _difference(*pair, torch.empty(2, 8, dtype=torch.float16), options=OPTIONS, center=True)
    with pytest.raises(ValueError, match=r"reference must have shape \[2, 8\]"):
        _difference(pair[0], pair[1][:1], torch.empty(2, 8), options=OPTIONS, center=True)
    with pytest.raises(ValueError, match=r"rows\.reference must be given, got None"):
        _difference(pair[0], None, torch.empty(2, 8), options=OPTIONS, center=True)
    with pytest.raises(ValueError, match=r"out must be rows\.teacher itself or share no memory with it"):
        _difference(*pair, pair[0].expand(2, 8).as_strided((2, 8), (4, 1)), options=OPTIONS, center=True)
    assert _difference(*[torch.empty(0, 8)] * 3, options=OPTIONS, center=True).shape == (0,)
