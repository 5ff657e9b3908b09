"""Sweep 2 in the interpreter, behind sweep 1, against the float64 oracle and autograd through it."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from kernel_helpers import (
    BLOCK,
    DTYPES,
    EPSILON,
    Guarded,
    oracle_logits,
    oracle_rows,
    oracle_target,
    poisoned,
    relative_error,
    rows_of,
    small_blocks,  # noqa: F401
)

from popsd import oracle
from popsd_kernels import LogitTransform, RowLoss, RowOptions, RowStatistics, launch, row_loss_gradient, row_statistics
from popsd_kernels.sweeps import loss_gradient

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
TRANSFORMED = RowOptions(
    inv_temperature=1.0 / 1.3, student=LogitTransform(0.7, 8.0), target=LogitTransform(1.9, 12.0), delta_scale=1.4
)
BETAS = (0.0, 0.3, 1.0)


def _streams(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, gap: float = 0.3) -> list[torch.Tensor]:
    torch.manual_seed(rows * vocabulary)
    student = torch.randn(rows, vocabulary) * 4 + 10
    base = student + gap * torch.randn(rows, vocabulary)
    return [x.to(dtype) for x in (student, base, gap * torch.randn(rows, vocabulary))]


def _sweeps(
    options, student, base, delta=None, student_bias=None, target_bias=None, gradient=None, **vectors
) -> RowLoss:
    """Both sweeps; with ``delta`` the purified target, composed into a buffer of its own."""
    vectors |= {"student_bias": student_bias, "frozen_bias": target_bias}
    if delta is None:
        rows = rows_of(student, base, **vectors)
        return row_loss_gradient(rows, row_statistics(rows, options), options, gradient=gradient)
    offset = (options.delta_scale * options.inv_temperature * delta.double()).mean(1).float()
    rows, target = rows_of(student, base, delta, offset, **vectors), torch.empty_like(delta, dtype=torch.float32)
    statistics = row_statistics(rows, options, target_out=target)
    guarded = Guarded(target)
    found = row_loss_gradient(rows.with_target(guarded.view), statistics, options, gradient=gradient)
    guarded.assert_unchanged()
    return found


def _check(
    options, student, base, delta=None, student_bias=None, target_bias=None, dtype=torch.float32, tolerance=1e-5
):
    rows, vocabulary = student.shape
    row_scale = torch.linspace(0.5, 2.0, rows)
    inputs = [Guarded(x) for x in (student, base)]
    gradient = poisoned(rows, vocabulary, dtype)
    token_ids = torch.arange(rows) * 5 % vocabulary
    found = _sweeps(
        options, inputs[0].view, inputs[1].view, delta, student_bias, target_bias,
        gradient=gradient.view, row_scale=row_scale, token_ids=token_ids,
    )  # fmt: skip
    for x in inputs:
        x.assert_unchanged()
    gradient.assert_intact()
    log_q = oracle_target(options, base, delta, target_bias)
    expected = oracle_rows(options, student, log_q, student_bias, row_scale)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name in ("divergence", "student_kl", "target_kl"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), **close, msg=name)
    torch.testing.assert_close(found.student_entropy.double(), oracle.entropy(expected.log_p), **close)
    torch.testing.assert_close(found.target_entropy.double(), oracle.entropy(log_q), **close)
    torch.testing.assert_close(found.token_logprob.double(), expected.log_p[torch.arange(rows), token_ids], **close)
    assert found.argmax_agreement.tolist() == (expected.log_p.argmax(1) == log_q.argmax(1)).float().tolist()
    if vocabulary > 1:
        assert relative_error(gradient.view, expected.gradient) < tolerance + EPSILON[dtype] * (dtype != torch.float32)
    else:
        assert (gradient.view == 0).all()
    bare = _sweeps(options, student, base, delta, student_bias, target_bias, row_scale=row_scale)
    for a, b in zip(bare[:-1], found[:-1], strict=True):  # compiled, the two differ by 1e-7: sums in another order
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg="the gradient changes no result")
    assert bare.token_logprob.isnan().all()
    return found, expected


SIZES = [1, 97, BLOCK, 2 * BLOCK + 1]
"""One entry; a tail alone; a full block alone; two full blocks and a tail of one entry."""


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("beta", BETAS)
def test_shapes(beta, vocabulary):
    _check(replace(PLAIN, beta=beta), *_streams(1, vocabulary))


def test_seven_rows():
    found, _ = _check(PLAIN, *_streams(7, 2 * BLOCK + 1, gap=1.0))
    assert 0 < found.argmax_agreement.sum() < 7, "both outcomes of the agreement are exercised"


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_in_and_out(beta, dtype):
    student, base, _ = _streams(2, 300, dtype)
    _check(replace(PLAIN, beta=beta), student, base, dtype=dtype)


@pytest.mark.parametrize(
    ("beta", "purified", "bias_dtype"),
    [
        (0.0, True, torch.bfloat16), (0.0, False, torch.float32), (0.3, True, None), (0.3, True, torch.float32),
        (0.3, False, torch.bfloat16), (1.0, False, None), (1.0, True, torch.bfloat16),
    ],
)  # fmt: skip
def test_transforms(beta, purified, bias_dtype):
    """Temperature, scale and soft cap of either stream; the gradient goes back through all of them. Each pair of the three
    parameters once: the transforms know nothing of beta."""
    student, base, delta = _streams(2, 300)
    biases = [None, None] if bias_dtype is None else [torch.randn(300).to(bias_dtype) for _ in range(2)]
    options = replace(TRANSFORMED, beta=beta)
    _check(options, student - 10, base - 10, delta if purified else None, *biases, tolerance=2e-5)


@pytest.mark.parametrize("beta", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("clips", [(0.01, None), (None, 0.05), (0.01, 0.05)])
def test_clips(beta, clips):
    """Entries and tokens are capped in part, so capped and uncapped paths both carry weight."""
    options = replace(PLAIN, beta=beta, entry_clip=clips[0], token_clip=clips[1])
    student, base, delta = _streams(3, 300, gap=2.0)
    base[1], delta[1] = student[1] + 0.05 * delta[1], 0.05 * delta[1]
    found, expected = _check(options, student, base, delta, tolerance=2e-5)
    if clips[0] is not None:
        f = oracle_entries(options, expected.log_p, oracle_target(options, base, delta))
        assert found.clip_fraction.double().sub((f > clips[0]).double().mean(1)).abs().max() < 1e-6
        assert found.clip_fraction.max() > 0 or beta in (0.02, 0.98)
    if clips[1] is not None and clips[0] is None:
        assert found.token_clipped.sum() in (1, 2) or beta in (0.02, 0.98)
        assert (found.divergence[found.token_clipped == 1] == torch.tensor(clips[1])).all()


def oracle_entries(options: RowOptions, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """f per entry: the oracle's divergence of each entry on its own, unclipped."""
    from kernel_helpers import oracle_config

    config = oracle_config(replace(options, entry_clip=None, token_clip=None))
    return oracle.divergence(log_p[..., None], log_q[..., None], config)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("clips", [(None, None), (0.01, 0.3)])
def test_a_small_weight_of_the_mixture_costs_no_digits(beta, clips):
    """The loss is as small as the smaller weight, and so must errors be. With log2 of a sum near 1, the loss was off by
    7e-5 of itself at 0.01 and by all of it at 1e-6. clips: in units of that weight."""
    size = min(beta, 1.0 - beta)
    entry_clip, token_clip = (None if clip is None else clip * size for clip in clips)
    options = replace(PLAIN, beta=beta, entry_clip=entry_clip, token_clip=token_clip)
    student, base, delta = _streams(3, 300)
    base[0] += 2.0 * torch.randn(300)
    gradient = torch.empty(3, 300)
    found = _sweeps(options, student, base, delta, gradient=gradient)
    expected = oracle_rows(options, student, oracle_target(options, base, delta))
    torch.testing.assert_close(found.divergence.double(), expected.divergence, rtol=2e-5, atol=0.0)
    kept = expected.gradient.norm(dim=1) > 0
    errors, norms = (gradient - expected.gradient).norm(dim=1), expected.gradient.norm(dim=1)
    assert kept.any() and (errors[kept] < 2e-5 * norms[kept]).all()
    assert (gradient[~kept] == 0).all()
    assert entry_clip is None or found.clip_fraction.max() > 0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("deviation", "kl"), [(3.0, 1e-3), (3.0, 1.0), (10.0, 1e-1), (30.0, 1e-3), (30.0, 1.0)])
def test_accuracy_of_float32(beta, kl, deviation):
    """The regimes of self-distillation: nearly equal distributions, logits up to +-100."""
    torch.manual_seed(1)
    student = torch.randn(3, 700) * deviation
    weight = student.double().softmax(1)
    noise = torch.randn(3, 700).double()
    noise = noise / (weight * (noise - (weight * noise).sum(1, keepdim=True)) ** 2).sum(1, keepdim=True).sqrt()
    target = (student.double() + (2 * kl) ** 0.5 * noise.clamp(-20, 20)).float()
    options = replace(PLAIN, beta=beta)
    gradient = torch.empty(3, 700)
    found = _sweeps(options, student, target, gradient=gradient)
    expected = oracle_rows(options, student, oracle_target(options, target, None))
    assert (found.divergence - expected.divergence).abs().max() <= 1e-6 + 2e-5 * expected.divergence.abs().max()
    # At deviation 30 one entry has nearly all the mass: its log-ratio, near 0, carries the rounding of log(1 + small).
    assert relative_error(gradient, expected.gradient) < (2e-5 if deviation < 30 else 5e-5)


@pytest.mark.parametrize(("beta", "dtype"), [(0.0, torch.float32), (0.3, torch.float16), (1.0, torch.float32)])
def test_minus_infinity_is_as_if_the_entry_were_absent(beta, dtype):
    options = replace(PLAIN, beta=beta)
    student, base, _ = _streams(2, 300, dtype)
    keep = torch.arange(300) % 3 != 0
    dense = torch.empty(2, int(keep.sum()))
    expected = _sweeps(options, student[:, keep].contiguous(), base[:, keep].contiguous(), gradient=dense)
    student[:, ~keep], base[:, ~keep] = float("-inf"), float("-inf")
    gradient = torch.empty(2, 300)
    found = _sweeps(options, student, base, gradient=gradient)
    assert (gradient[:, ~keep] == 0).all()
    assert relative_error(gradient[:, keep], dense) < 1e-5
    for x, y in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("options", [replace(PLAIN, beta=0.0), PLAIN, replace(PLAIN, entry_clip=0.1)])
@pytest.mark.parametrize("purified", [True, False])
def test_row_scale_zero_is_exactly_zero_even_for_nan(options, purified):
    student, base, delta = _streams(4, 300)
    clean = torch.empty(4, 300)
    _sweeps(options, student, base, delta if purified else None, gradient=clean)
    student[1], base[2] = float("nan"), float("inf")
    row_scale = torch.tensor([2.0, 0.0, 0.0, -1.0])
    gradient = poisoned(4, 300, torch.bfloat16)
    _sweeps(options, student, base, delta if purified else None, gradient=gradient.view, row_scale=row_scale)
    gradient.assert_intact()
    assert (gradient.view[1:3] == 0).all()
    assert relative_error(gradient.view[[0, 3]], clean[[0, 3]] * row_scale[[0, 3], None]) < EPSILON[torch.bfloat16]


def test_gradient_may_take_the_differences_memory():
    """bfloat16 rows over float32 ones: half as wide, twice the stride."""
    student, base, delta = _streams(3, 300)
    expected = torch.empty(3, 300, dtype=torch.bfloat16)
    _sweeps(PLAIN, student, base, delta, gradient=expected)
    rows, target = rows_of(student, base, delta, delta.mean(1)), torch.empty(3, 300)
    statistics = row_statistics(rows, PLAIN, target_out=target)
    over = delta.view(torch.bfloat16)[:, :300]
    assert over.stride(0) == 600
    row_loss_gradient(rows.with_target(target), statistics, PLAIN, gradient=over)
    assert relative_error(over, expected) < 1e-6 + EPSILON[torch.bfloat16]


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_in_place_of_the_target(beta):
    student, base, _ = _streams(2, 300)
    options = replace(PLAIN, beta=beta)
    expected = torch.empty(2, 300)
    _sweeps(options, student, base, gradient=expected)
    _sweeps(options, student, base, gradient=base)
    assert relative_error(base, expected) < 1e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_sampled_token_is_read_before_a_gradient_in_place_of_the_student(beta, clip):
    """Forward KL stores the gradient while it sums: the token's logit must have been read before. What threads do to one
    another in the other modes the interpreter, which runs one at a time, cannot show; a barrier stands between."""
    student, base, _ = _streams(2, 300)
    options, token_ids = replace(PLAIN, beta=beta, entry_clip=clip), torch.tensor([200, 7])
    expected = torch.empty(2, 300)
    apart = _sweeps(options, student, base, gradient=expected, token_ids=token_ids)
    log_p = student.double().log_softmax(1)[torch.arange(2), token_ids]
    found = _sweeps(options, student, base, gradient=student, token_ids=token_ids)
    for loss in (apart, found):
        torch.testing.assert_close(loss.token_logprob.double(), log_p, rtol=1e-5, atol=1e-6)
    assert relative_error(student, expected) < 1e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("clips", "purified"), [((None, None), False), ((0.05, None), True), ((None, 1.0), True), ((0.05, 1.0), False)]
)
def test_a_nan_reaches_the_loss_and_the_whole_gradient_of_its_row_alone(beta, clips, purified):
    """NumPy's minimum keeps a NaN and a GPU's drops it: that no clip hides one there is for test_aot.py to show, on the
    compiled instructions. This is the rule, and that it holds row by row."""
    options = replace(PLAIN, beta=beta, entry_clip=clips[0], token_clip=clips[1])
    student, base, delta = _streams(6, 300)
    clean, dirty = torch.empty(6, 300), torch.empty(6, 300)
    row_scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0])
    arguments = {"row_scale": row_scale, "token_ids": torch.arange(6)}
    expected = _sweeps(options, student, base, delta if purified else None, gradient=clean, **arguments)
    student[0, 5], base[1, 299], student[2, 3], base[3, :], student[4, 9] = (torch.nan,) * 5
    delta[2, 131] = torch.nan
    found = _sweeps(options, student, base, delta if purified else None, gradient=dirty, **arguments)
    assert found.divergence.isnan().tolist() == [True] * 5 + [False]
    assert (
        found.student_entropy.isnan().tolist()
        == found.token_logprob.isnan().tolist()
        == [x in (0, 2, 4) for x in range(6)]
    )
    assert found.target_entropy.isnan().tolist() == [x in (1, 3) or (purified and x == 2) for x in range(6)]
    assert (found.token_clipped[:5] == 0).all() and (found.argmax_agreement[:5] == 0).all()
    assert dirty[:4].isnan().all() and (dirty[4] == 0).all()
    assert relative_error(dirty[5], clean[5]) < 1e-6
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x[5], y[5], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_a_real_vocabulary(beta, monkeypatch):
    """Qwen3's 151,936 entries, which no small size stands for: sums of that length stay within the same tolerance."""
    monkeypatch.setattr(launch, "shipped_config", lambda kernel, device: launch.LaunchConfig(16384, 8, 8))
    _check(replace(PLAIN, beta=beta), *_streams(1, 151936))


def test_token_ids_outside_the_vocabulary_are_nan():
    student, base, _ = _streams(4, 300)
    found = _sweeps(PLAIN, Guarded(student).view, base, token_ids=torch.tensor([-1, 299, 300, 2**40]))
    assert found.token_logprob.isnan().tolist() == [True, False, True, True]


def test_no_rows():
    rows = rows_of(torch.empty(0, 5), torch.empty(0, 5))
    found = row_loss_gradient(rows, row_statistics(rows, PLAIN), PLAIN)
    assert [x.shape for x in found] == [(0,)] * len(RowLoss._fields)


def test_row_offsets_are_64_bit():
    """Row 2 of the gradient lies past 2^31 entries; see the same test of sweep 1."""
    stride, vocabulary = 2**30 + 16, 200
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2 * stride + vocabulary), flags=flags)
    rows = [torch.frombuffer(memory, dtype=torch.float16, count=vocabulary, offset=2 * r * stride) for r in range(3)]
    student, base, _ = _streams(3, vocabulary)
    expected = torch.empty(3, vocabulary, dtype=torch.float16)
    _sweeps(PLAIN, student, base, gradient=expected)
    operands, results = rows_of(student, base), launch.result_rows(len(RowLoss._fields), 3, torch.device("cpu"))
    planned = loss_gradient.plan(
        operands, row_statistics(operands, PLAIN), PLAIN, launch.Outputs(results, rows[0][None]),
        launch.LaunchConfig(BLOCK, 4, 4), False,
    )  # fmt: skip
    planned.arguments["gradient"] = planned.arguments["gradient"]._replace(row_stride=stride)
    planned.run(torch.device("cpu"))
    assert torch.equal(torch.stack(rows), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(3, 8)}, ValueError, r"rows\.target must have shape \[2, 8\]"),
        ({"gradient": torch.zeros(8, 2).T}, ValueError, "gradient must have unit stride"),
        (
            {"gradient": torch.zeros(2, 8, dtype=torch.float64)},
            TypeError,
            r"gradient must be torch\.float32 or torch\.bfloat16 or torch\.float16",
        ),
        ({"token_ids": torch.zeros(2, dtype=torch.int32)}, TypeError, "token_ids must be torch.int64"),
        ({"row_scale": torch.zeros(3)}, ValueError, r"row_scale must have shape \[2\]"),
        ({"statistics": (torch.zeros(2),) * 3 + (torch.zeros(1),)}, ValueError, "statistics.target_logsum"),
        ({"student_bias": torch.zeros(8, dtype=torch.int64)}, TypeError, "student_bias"),
    ],
)
def test_refusals(changes, error, message):
    statistics, gradient = changes.pop("statistics", (torch.zeros(2),) * 4), changes.pop("gradient", None)
    rows = rows_of(torch.zeros(2, 8), torch.zeros(2, 8))._replace(**changes)
    with pytest.raises(error, match=message):
        row_loss_gradient(rows, RowStatistics(*statistics), PLAIN, gradient=gradient)


def test_a_target_still_to_be_composed_is_refused():
    matrix, vector = torch.zeros(2, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"rows\.target must be given.*pass rows\.with_target\(logits\)"):
        row_loss_gradient(rows_of(matrix, matrix, matrix, vector), RowStatistics(*[vector] * 4), PLAIN)


def test_gradient_may_not_reinterpret_what_is_still_read():
    student = torch.zeros(2, 8)
    half = student.view(torch.bfloat16)[:, :8]
    with pytest.raises(ValueError, match=r"gradient must be rows\.student itself or share no memory with it"):
        row_loss_gradient(rows_of(student, student), RowStatistics(*[torch.zeros(2)] * 4), PLAIN, gradient=half)


def test_helpers_agree_with_the_oracle():
    raw = torch.randn(2, 20)
    assert torch.allclose(oracle_logits(raw, LogitTransform()), raw.double())
