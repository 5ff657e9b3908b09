"""A row over several programs in three launches, for few tokens, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import (
    BLOCK,
    Guarded,
    oracle_rows,
    oracle_target,
    poisoned,
    relative_error,
    rows_of,
    small_blocks,  # noqa: F401
)

import popsd
from popsd import oracle
from popsd_kernels import LogitTransform, RowOptions, launch, row_single_read, row_split_sweeps
from popsd_kernels.sweeps import few_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
HARD = RowOptions(
    inv_temperature=0.8, pmi_beta=0.5, pmi_clip=2.0, entry_clip=0.02, token_clip=2.0, delta_scale=1.3,
    student=LogitTransform(0.7, 8.0), target=LogitTransform(0.9),
)  # fmt: skip


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    monkeypatch.setattr(few_rows, "shipped_config", launch.shipped_config)


def _streams(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(vocabulary)
    student = torch.randn(3, vocabulary) * 3
    return student, student + torch.randn(3, vocabulary), torch.randn(3, vocabulary)


MATRIX = [
    (PLAIN, True, 97),
    (PLAIN, False, BLOCK),
    *((o, two, 2 * BLOCK + 1) for o in (PLAIN, HARD) for two in (True, False)),
]
"""A masked slice alone; a full one alone; both kinds of slices with all options."""


@pytest.mark.parametrize(("options", "purified", "vocabulary"), MATRIX)
@pytest.mark.parametrize("beta", [0.0, 0.02, 0.3, 1.0])
def test_matches_the_oracle(options, purified, beta, vocabulary):
    options = replace(options, beta=beta)
    student, base, delta = _streams(vocabulary)
    if not purified:
        delta, offset = None, None
    else:
        offset = delta.double().mean(1).float() * (options.delta_scale * options.inv_temperature)
    biases = (torch.randn(vocabulary), torch.randn(vocabulary)) if options is not PLAIN else (None, None)
    row_scale, token_ids = torch.tensor([1.5, 1.0, 0.0]), torch.tensor([3, -1, 7])
    inputs, gradient = [Guarded(x) for x in (student, base)], poisoned(3, vocabulary)
    rows = rows_of(
        inputs[0].view, inputs[1].view, delta, offset, student_bias=biases[0], frozen_bias=biases[1], token_ids=token_ids
    )  # fmt: skip
    _, found = row_split_sweeps(rows._replace(row_scale=row_scale), options, gradient=gradient.view)
    for x in inputs:
        x.assert_unchanged()
    gradient.assert_intact()
    log_q = oracle_target(options, base, delta, biases[1])
    expected = oracle_rows(options, student, log_q, biases[0], row_scale)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name in ("divergence", "student_kl", "target_kl"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), **close, msg=name)
    torch.testing.assert_close(found.student_entropy.double(), oracle.entropy(expected.log_p), **close)
    torch.testing.assert_close(found.token_logprob[0].double(), expected.log_p[0, 3], **close)
    assert found.token_logprob[1].isnan()
    assert relative_error(gradient.view, expected.gradient) < 2e-5
    assert (gradient.view[2] == 0).all()
    _, bare = row_split_sweeps(rows, options)
    for a, b in zip(bare[:-1], found[:-1], strict=True):  # another kernel to the compiler: the same to rounding
        torch.testing.assert_close(a, b, **close, msg="the gradient changes no result")


def test_impossible_entries_and_a_masked_row_of_nan():
    student, base, delta = _streams(300)
    student[0, 128:140] = base[0, 128:140] = float("-inf")
    student[1] = float("nan")
    gradient = poisoned(3, 300, torch.bfloat16)
    rows = rows_of(student, base, delta, delta.mean(1), row_scale=torch.tensor([1.0, 0.0, 1.0]))
    _, found = row_split_sweeps(rows, PLAIN, gradient=gradient.view)
    rest = torch.ones(300, dtype=torch.bool)
    rest[128:140] = False
    expected = oracle_rows(PLAIN, student[:1, rest], oracle_target(PLAIN, base[:1], delta[:1])[:, rest])
    torch.testing.assert_close(found.divergence[:1].double(), expected.divergence, rtol=1e-5, atol=1e-6)
    assert (gradient.view[0, 128:140] == 0).all() and (gradient.view[1] == 0).all()


@pytest.mark.parametrize("stream", [1, 2])
def test_the_gradient_may_take_the_place_of_target_or_difference(stream):
    streams, expected, ids = list(_streams(300)), torch.empty(3, 300), torch.tensor([3, -1, 7])
    vectors = {"offset": streams[2].mean(1), "token_ids": ids}
    _, separate = row_split_sweeps(rows_of(*streams, **vectors), PLAIN, gradient=expected)
    place = streams[stream] = streams[stream].clone()
    _, in_place = row_split_sweeps(rows_of(*streams, **vectors), PLAIN, gradient=place)
    assert relative_error(place, expected) < 1e-6
    torch.testing.assert_close(in_place.token_logprob, separate.token_logprob, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_it_is_chosen_where_a_gpu_would_idle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    gpu = torch.device("cuda")
    assert launch.too_few_rows(180, 26, 38, gpu) and not launch.too_few_rows(181, 26, 38, gpu)
    assert not launch.too_few_rows(1, 26, 38, torch.device("cpu")), "never by accident in the interpreter"


@pytest.mark.parametrize("two", [True, False])
def test_the_tile_loop_uses_it(two, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls, original = [], few_rows.row_split_sweeps
    monkeypatch.setattr(few_rows, "row_split_sweeps", lambda *a, **k: calls.append(1) or original(*a, **k))
    logits = _streams(150)
    leaves = [logits[0].clone().requires_grad_() for _ in range(2)]
    results = []
    for few, leaf in zip((False, True), leaves, strict=True):
        monkeypatch.setattr(launch, "too_few_rows", lambda *a, few=few: few)
        if two:
            output = popsd.jsd(leaf, logits[1], impl="triton")
        else:
            output = popsd.purified_jsd(leaf, *logits[1:], logits[0], impl="triton")
        output.loss.sum().backward()
        results.append(output)
        assert bool(calls) == few
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=1e-5, atol=1e-6)
    assert relative_error(leaves[1].grad, leaves[0].grad) < 1e-5
    assert launch.sweep_bytes(PLAIN, True, True) == (34, 38)
    assert launch.sweep_bytes(replace(PLAIN, beta=0.0), False, True) == (18, 26)


@pytest.mark.parametrize("launcher", [row_split_sweeps, row_single_read])
def test_a_target_relative_to_the_student_is_refused(launcher):
    student, base, delta = _streams(97)
    options = replace(PLAIN, minus_student=True)
    with pytest.raises(ValueError, match="minus_student must be False, got True"):
        launcher(rows_of(student, base, delta, delta.mean(1)), options, gradient=torch.empty(3, 97))
