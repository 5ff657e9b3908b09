"""Sweep 1 in the interpreter against the float64 oracle."""

from __future__ import annotations

import doctest
import importlib
import mmap
from dataclasses import replace

import pytest
import torch
from kernel_helpers import (
    BLOCK,
    DTYPES,
    Guarded,
    oracle_config,
    oracle_logits,
    oracle_target,
    poisoned,
    relative_error,
    rows_of,
    small_blocks,  # noqa: F401
)

from popsd import oracle
from popsd_kernels import LogitTransform, RowOptions, Rows, launch, row_statistics
from popsd_kernels.sweeps import statistics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
TRANSFORMED = RowOptions(
    inv_temperature=1.0 / 1.3, student=LogitTransform(0.7, 8.0), target=LogitTransform(1.9, 12.0), delta_scale=1.4
)


def _streams(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(rows * vocabulary)
    student = torch.randn(rows, vocabulary) * 4 + 10
    base = student + 0.3 * torch.randn(rows, vocabulary)
    return [x.to(dtype) for x in (student, base, 1.5 * torch.randn(rows, vocabulary))]


def _check(options: RowOptions, student, base, delta, student_bias=None, target_bias=None) -> None:
    guarded = [Guarded(x) for x in (student, base, delta)]
    out = poisoned(*student.shape)
    scaled = options.delta_scale * options.inv_temperature * delta.double()
    rows = rows_of(
        *(x.view for x in guarded), scaled.mean(1).float(), student_bias=student_bias, frozen_bias=target_bias
    )
    found = row_statistics(rows, options, target_out=out.view)
    for x in guarded:
        x.assert_unchanged()
    out.assert_intact()
    log_q = oracle_target(options, base, delta, target_bias)
    log_p = oracle.log_probs(oracle_logits(student, options.student, student_bias), oracle_config(options))
    u = out.view.double()
    assert (u.log_softmax(1) - log_q).abs().max() < 1e-5
    _check_normalisers(found[2:], u)
    s = oracle_logits(student, options.student, student_bias) * options.inv_temperature
    _check_normalisers(found[:2], s)
    assert (s - s.logsumexp(1, keepdim=True) - log_p).abs().max() < 1e-12, "the reference agrees with itself"


def _check_normalisers(found, logits: torch.Tensor) -> None:
    maximum = logits.amax(1)
    assert (found[0] - maximum).abs().max() <= 5e-6
    lse = found[0].double() + found[1].double()
    assert (lse - logits.logsumexp(1)).abs().max() <= 5e-6


SHAPES = [(1, 1), (1, 97), (1, BLOCK), (1, 2 * BLOCK + 1), (7, 2 * BLOCK + 1)]
"""One entry; a tail alone; a full block alone; two full blocks and a tail of one entry; the same in several rows."""


@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_shapes(rows, vocabulary):
    if rows == 7 and vocabulary == 1000:
        rows = 2
    _check(PLAIN, *_streams(rows, vocabulary))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    _check(PLAIN, *_streams(3, 300, dtype))


@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("pmi_clip", [None, 2.0])
def test_transforms(bias_dtype, pmi_clip):
    biases = [None, None] if bias_dtype is None else [torch.randn(300).to(bias_dtype) for _ in range(2)]
    _check(replace(TRANSFORMED, pmi_clip=pmi_clip, pmi_beta=0.5), *_streams(2, 300), *biases)


def test_two_distributions():
    student, target, _ = _streams(3, 2 * BLOCK + 1, torch.bfloat16)
    found = row_statistics(rows_of(Guarded(student).view, Guarded(target).view), TRANSFORMED)
    for stream, transform, pair in ((student, TRANSFORMED.student, found[:2]), (target, TRANSFORMED.target, found[2:])):
        _check_normalisers(pair, oracle_logits(stream, transform) * TRANSFORMED.inv_temperature)


@pytest.mark.parametrize("alias", ["base", "difference"])
def test_target_out_may_take_an_inputs_memory(alias):
    student, base, delta = _streams(3, 300)
    apart = torch.empty_like(base)
    rows = rows_of(student, base, delta, delta.mean(1))
    expected = row_statistics(rows, PLAIN, target_out=apart)
    memory = getattr(rows, alias)
    found = row_statistics(rows, PLAIN, target_out=memory)
    torch.testing.assert_close(memory, apart, rtol=1e-6, atol=1e-6)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_as_if_the_entry_were_absent(dtype):
    student, base, delta = _streams(2, 300, dtype)
    keep = torch.arange(300) % 3 != 0
    offset = delta.float().mean(1)
    expected = row_statistics(
        rows_of(*(x[:, keep].contiguous() for x in (student, base, delta)), offset), PLAIN,
        target_out=torch.empty(2, int(keep.sum())),
    )  # fmt: skip
    student[:, ~keep], base[:, ~keep] = float("-inf"), float("-inf")
    out = torch.empty(2, 300)
    found = row_statistics(rows_of(student, base, delta, offset), PLAIN, target_out=out)
    assert (out[:, ~keep] == -1e30).all()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_an_impossible_row_is_uniform_and_a_nan_row_is_nan():
    student = torch.stack([torch.full((300,), float("-inf")), torch.zeros(300)])
    student[1, 200] = float("nan")
    found = row_statistics(rows_of(student, student), PLAIN)
    assert found.student_max[0] == -1e30
    assert abs(float(found.student_logsum[0]) - 5.7037825) < 1e-5
    assert (found.student_max + found.student_logsum)[1].isnan()


def test_no_rows():
    found = row_statistics(rows_of(torch.empty(0, 5), torch.empty(0, 5)), PLAIN)
    assert [x.shape for x in found] == [(0,)] * 4


def test_row_offsets_are_64_bit():
    """Three rows 2^30 float16 entries apart: row 2 starts past 2^31. The address space is reserved, not filled."""
    stride, vocabulary = 2**30 + 16, 200
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2 * stride + vocabulary), flags=flags)
    rows = [torch.frombuffer(memory, dtype=torch.float16, count=vocabulary, offset=2 * r * stride) for r in range(3)]
    compact = (torch.randn(3, vocabulary) * 4).half()
    for row, values in zip(rows, compact, strict=True):
        row.copy_(values)
    out = launch.result_rows(4, 3, torch.device("cpu"))
    config = launch.LaunchConfig(BLOCK, 4, 4)
    first = rows[0][None]
    planned = statistics.plan(rows_of(first, first), PLAIN, launch.Outputs(out), config, False)
    streams = {name: planned.arguments[name]._replace(row_stride=stride) for name in ("student", "target")}
    replace(planned, rows=3, arguments=planned.arguments | streams).run(torch.device("cpu"))
    expected = row_statistics(rows_of(compact, compact), PLAIN)
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))


def test_the_difference_matters():
    """Guards the suite itself: without delta the target's statistics are far from the purified ones."""
    student, base, delta = _streams(2, 300)
    out = torch.empty(2, 300)
    row_statistics(rows_of(student, base, delta, delta.mean(1)), PLAIN, target_out=out)
    assert relative_error(base.log_softmax(1), out.log_softmax(1)) > 0.05


def composed() -> Rows:
    return rows_of(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": torch.zeros(8)}, ValueError, r"rows\.student must be \[tokens, vocabulary\]"),
        ({"student": torch.zeros(2, 0)}, ValueError, "columns"),
        ({"student": torch.zeros(2, 16)[:, ::2]}, ValueError, r"rows\.student must have unit stride"),
        ({"base": torch.zeros(2, 9)}, ValueError, r"rows\.base must have shape \[2, 8\], got \[2, 9\]"),
        ({"base": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, r"rows\.base must be torch\.float32 or .*float64"),
        ({"difference": torch.zeros(2, 8, device="meta")}, ValueError, r"rows\.difference must be on cpu"),
        ({"reference": torch.zeros(3, 8)}, ValueError, r"rows\.reference must have shape \[2, 8\]"),
        ({"student_bias": torch.zeros(7)}, ValueError, r"rows\.student_bias must have shape \[8\]"),
        ({"frozen_bias": torch.zeros(16)[::2]}, ValueError, r"rows\.frozen_bias must be contiguous"),
        ({"difference": None}, ValueError, r"must be given together, got base and offset alone"),
        ({"base": None, "difference": None, "offset": None}, ValueError, "one target must be given, got none"),
        ({"target": torch.zeros(2, 8)}, ValueError, "one target must be given, got two"),
        ({"offset": torch.zeros(2, dtype=torch.float64)}, TypeError, r"rows\.offset must be torch\.float32"),
    ],
)  # fmt: skip
def test_refusals(changes, error, message):
    with pytest.raises(error, match=f"row_statistics: .*{message}"):
        row_statistics(composed()._replace(**changes), PLAIN, target_out=torch.zeros(2, 8))


def test_target_out_goes_with_a_composed_target():
    rows, out = composed(), torch.zeros(2, 8)
    with pytest.raises(
        ValueError, match=r"rows\.difference and target_out must be given together, got rows\.difference alone"
    ):
        row_statistics(rows, PLAIN)
    with pytest.raises(ValueError, match="got target_out alone"):
        row_statistics(rows_of(out, out), PLAIN, target_out=torch.zeros(2, 8))
    with pytest.raises(TypeError, match=r"target_out must be torch\.float32, got torch\.bfloat16"):
        row_statistics(rows, PLAIN, target_out=out.bfloat16())
    with pytest.raises(ValueError, match="must be raw projections, got finished logits"):
        row_statistics(rows.with_target(out), replace(PLAIN, minus_student=True))


def test_finished_logits_are_neither_tempered_nor_biased():
    torch.manual_seed(0)
    logits, rows = torch.randn(2, 300), rows_of(torch.randn(2, 300), torch.randn(2, 300), frozen_bias=torch.randn(300))
    found = row_statistics(rows.with_target(logits), RowOptions(inv_temperature=0.5))
    assert relative_error(found.target_max + found.target_logsum, logits.double().logsumexp(1)) < 1e-6


def test_target_out_may_not_be_the_student():
    rows = composed()
    with pytest.raises(ValueError, match=r"target_out must not share memory with rows\.student"):
        row_statistics(rows, PLAIN, target_out=rows.student)


def test_target_out_may_not_reinterpret_an_input():
    memory = torch.zeros(2, 8)
    rows = composed()._replace(base=memory.view(torch.float16)[:, :8])
    with pytest.raises(ValueError, match=r"target_out must be rows\.base itself or share no memory with it"):
        row_statistics(rows, PLAIN, target_out=memory)


@pytest.mark.parametrize("module", ["statistics", "loss_gradient"])
def test_the_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"popsd_kernels.sweeps.{module}"))
    assert results.attempted > 5 and results.failed == 0
