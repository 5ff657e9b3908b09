"""The moments of Eq. 4 against the oracle's decomposition, and against the torch backend."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BLOCK, Guarded, small_blocks  # noqa: F401

import popsd
from popsd import Decomposition, Head, HiddenStates, PurifiedConfig, oracle
from popsd.engine.chunks.decomposition import fields_of
from popsd.engine.torch_backend.moments import row_moments as torch_moments
from popsd.testing import make_head, make_hidden, relative_l2
from popsd_kernels import LogitTransform, RowOptions, Rows, row_moments
from popsd_kernels.rows import MOMENTS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
CAPPED = RowOptions(inv_temperature=0.8, student=LogitTransform(0.7, 9.0), target=LogitTransform(1.3, 12.0))


def streams(vocabulary: int, apart: float = 1.0, impossible: bool = False) -> list[torch.Tensor]:
    """Student, reference and teacher [3, V], the likely tokens among the first and the last."""
    torch.manual_seed(vocabulary)
    base = torch.randn(3, vocabulary) * 3
    base[:, [2, -1]] += 9.0
    result = [base + apart * torch.randn(3, vocabulary) + shift for shift in (0.0, 4.0 * apart, -2.0 * apart)]
    if impossible:
        result[0][:, 5], result[1][1, :40], result[2][2, -3:] = -torch.inf, -torch.inf, -torch.inf
    return result


def given(raw: list[torch.Tensor]) -> Rows:
    return Rows(raw[0], reference=raw[1], teacher=raw[2])


def truth(raw: list[torch.Tensor], options: RowOptions, biases: list[torch.Tensor | None]) -> Decomposition:
    transforms = (options.student, options.target, options.target)
    tempered = []
    for x, transform, bias in zip(raw, transforms, biases, strict=True):
        z = (x.double() + (0.0 if bias is None else bias.double())) * transform.scale
        z = z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)
        tempered.append(z * options.inv_temperature)
    student, reference, teacher = tempered
    return oracle.decompose(student, teacher, reference, PurifiedConfig())


def assert_close(found: Decomposition, expected: Decomposition, relative: float, cosine: float) -> None:
    for name, value in found._asdict().items():
        wanted = getattr(expected, name)
        if "cos" in name:
            assert (value.double() - wanted).abs().max() < cosine, name
        else:
            assert relative_l2(value, wanted) < relative, name


SIZES = [3, BLOCK, 2 * BLOCK + 1]
"""A tail alone, as small as the cosines mean anything; a full block alone; two full blocks and a tail of one entry."""


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "softcap, scale, bias, temperature"])
def test_matches_the_oracle(options, vocabulary):
    raw = streams(vocabulary)
    biases = [None] * 3 if options is PLAIN else [torch.randn(vocabulary)] + [torch.randn(vocabulary)] * 2
    guarded = [Guarded(x) for x in raw]
    student, reference, teacher = (x.view for x in guarded)
    rows = Rows(student, reference=reference, teacher=teacher, student_bias=biases[0], frozen_bias=biases[1])
    moments = row_moments(rows, options)
    for x in guarded:
        x.assert_unchanged()
    assert_close(fields_of(moments), truth(raw, options, biases), 1e-5, 1e-5)
    assert (moments[12] == vocabulary).all()
    torch.testing.assert_close(moments, torch_moments(rows, options), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_a_teacher_given_as_its_difference(masked):
    student, reference, teacher = streams(300)
    options = RowOptions(delta_scale=0.5, inv_temperature=1.0)
    rows = Rows(student, reference=reference, difference=2.0 * (teacher - reference))
    moments = row_moments(rows, options, masked=masked)
    assert_close(fields_of(moments), truth([student, reference, teacher], options, [None] * 3), 1e-5, 1e-5)


def test_likely_tokens_that_agree_beside_unlikely_ones_that_do_not():
    """Log-ratios of 0.01 where the mass is and of 30 elsewhere: sums about the vocabulary's mean would lose four digits."""
    torch.manual_seed(0)
    student, likely = torch.randn(3, 1000) * 2, torch.randperm(1000)[:30]
    student[:, likely] += 12.0
    ratios = [30.0 + torch.randn(3, 1000) for _ in range(2)]
    for ratio in ratios:
        ratio[:, likely] = 0.01 * torch.randn(3, 30)
    raw = [student, student + ratios[0], student + ratios[1]]
    moments = row_moments(given(raw), PLAIN)
    assert_close(fields_of(moments), truth(raw, PLAIN, [None] * 3), 2e-5, 2e-5)


def test_streams_a_constant_apart_differ_in_nothing_but_rounding():
    """Σx² about the mean is then a difference of sums that may fall below 0, which has no root."""
    student = streams(1000)[0]
    for k in (0, 3, 7, 13):
        moments = row_moments(given([student, student + 0.1 * k, student - 0.3 * k]), PLAIN)
        for name, field in fields_of(moments)._asdict().items():
            assert torch.isfinite(field).all(), name
            if "norm" in name:
                assert (field < 1e-4).all(), name


@pytest.mark.parametrize("apart", [1.0, 0.001])
def test_a_reference_given_as_its_difference_to_the_student(apart):
    """No log-ratio rounds at the size of the logits: a thousandth apart, 3e-7 instead of 3e-4 in the weighted fields; the raw
    ones, which need the log-normalisers' difference, 6e-5 instead of 2e-4. Impossible tokens stay out."""
    student, induced, delta = streams(300)[0], apart * torch.randn(3, 300), apart * torch.randn(3, 300)
    bias = torch.randn(300).index_fill(0, torch.tensor([5, 40]), -torch.inf)
    options = RowOptions(minus_student=True, inv_temperature=0.8)
    rows = Rows(student, reference=induced, difference=delta, student_bias=bias)
    truths = [student.double() + bias, student.double() + bias + induced, student.double() + bias + induced + delta]
    expected = oracle.decompose(*(0.8 * truths[k] for k in (0, 2, 1)), PurifiedConfig())
    for function in (row_moments, torch_moments):
        moments = function(rows, options)
        found = fields_of(moments)
        assert_close(found, expected, 1e-4, 2e-4)
        for name in Decomposition._fields[6:]:
            assert relative_l2(getattr(found, name), getattr(expected, name)) < 2e-6, name
        assert moments[12].tolist() == [298.0] * 3
    with pytest.raises(
        ValueError, match=r"rows\.difference must be given where options\.minus_student is True, got rows\.teacher"
    ):
        row_moments(given([student, induced, student]), options)


def test_impossible_entries_leave_every_sum():
    raw = streams(300, impossible=True)
    moments = row_moments(given(raw), PLAIN)
    assert moments[12].tolist() == [299.0, 260.0, 296.0]
    assert_close(fields_of(moments), truth(raw, PLAIN, [None] * 3), 1e-5, 1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_nan_reaches_the_fields_that_depend_on_its_stream(stream, masked):
    """Also where another stream says that the entry is impossible, and would leave it out."""
    raw = streams(300)
    expected = row_moments(given(raw), PLAIN, masked=masked)
    raw[stream][1, 200] = float("nan")
    if masked:
        raw[(stream + 1) % 3][1, 200] = -torch.inf
    moments = row_moments(given(raw), PLAIN, masked=masked)
    nan = moments.isnan()[:, 1].tolist()
    total, reference, transferable = stream != 1, stream != 2, stream != 0
    assert nan[10] >= total and nan[11] >= reference
    assert nan[0] >= total and nan[1] >= reference and nan[2] >= transferable
    assert nan[3] and nan[4], "products of two log-ratios know of every stream"
    assert nan[5] >= total and nan[6] >= reference and nan[7] >= transferable and nan[8] and nan[9]
    torch.testing.assert_close(moments[:, [0, 2]], expected[:, [0, 2]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(dtype):
    raw = [x.to(dtype) for x in streams(300)]
    moments = row_moments(given(raw), PLAIN)
    assert_close(fields_of(moments), truth(raw, PLAIN, [None] * 3), 1e-5, 1e-5)


def test_streams_a_thousandth_apart():
    raw = streams(1000, apart=0.001)
    moments = row_moments(given(raw), PLAIN)
    assert_close(fields_of(moments), truth(raw, PLAIN, [None] * 3), 5e-4, 5e-4)


@pytest.mark.parametrize("shared", [True, False], ids=["one head", "soft cap"])
def test_the_tile_loop_uses_it(shared, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden, made = make_hidden(5, 24, 0.4), make_head(157, 24, bias=True)
    head = made if shared else Head(made.weight, made.bias, softcap=9.0)
    results = [popsd.decompose(hidden, head, impl=impl) for impl in ("triton", "torch")]
    logits = HiddenStates(*(oracle.head_logits(x, head) for x in hidden))
    expected = oracle.decompose(logits.student, logits.teacher, logits.reference, PurifiedConfig())
    for found in results:
        assert_close(found, expected, 1e-4, 1e-4)


def test_bad_arguments_and_no_rows():
    student, reference, teacher = streams(97)
    rows = Rows(student, reference=reference)
    with pytest.raises(ValueError, match=r"one of rows\.teacher and rows\.difference must be given, got neither"):
        row_moments(rows, PLAIN)
    with pytest.raises(ValueError, match="got both"):
        row_moments(rows._replace(teacher=teacher, difference=teacher), PLAIN)
    with pytest.raises(ValueError, match=r"rows\.teacher must have shape \[3, 97\]"):
        row_moments(rows._replace(teacher=teacher[:, :90]), PLAIN)
    with pytest.raises(ValueError, match=r"rows\.reference must be given, got None"):
        row_moments(Rows(student, teacher=teacher), PLAIN)
    empty = given([x[:0] for x in (student, reference, teacher)])
    assert row_moments(empty, PLAIN).shape == (MOMENTS, 0)
