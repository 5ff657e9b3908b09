"""The streaming path in the interpreter: projection, sums and gradients against the float64 oracle and autograd through it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_helpers import (
    DTYPES,
    EPSILON,
    Expected,
    Guarded,
    oracle_rows,
    oracle_target,
    poisoned,
    relative_error,
    rows_of,
    run_without_interpreter,
)

from popsd import oracle
from popsd_kernels import Gradients, Heads, LogitTransform, RowLoss, RowOptions, Rows, launch
from popsd_kernels.streaming import loss, plan
from popsd_kernels.streaming.loss import stream_divergence

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = RowOptions()
TRANSFORMED = RowOptions(
    inv_temperature=1.0 / 1.3, student=LogitTransform(0.7, 8.0), target=LogitTransform(1.9, 12.0), delta_scale=1.4
)
BETAS, WIDTH = (0.0, 0.3, 1.0), 40
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""dH, relative L2: float32 arithmetic, or the gradient's rounding to the operands' dtype (kernel_helpers.EPSILON)."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Two strips at V = 200 and two programs to a strip, two token tiles at N = 17, a ragged last block of D = 40."""
    config = plan.TileConfig(16, 64, 32, 4, 1)
    monkeypatch.setattr(plan, "shipped_config", lambda kernel, operand_bytes, device: config)
    monkeypatch.setattr(plan, "processors", lambda device: 4)
    monkeypatch.setattr(loss, "MIN_STRIP", 128)
    monkeypatch.setattr(loss, "STRIP_BYTES", 0)


class Problem:
    """Hidden states and heads around common ones, so that distributions differ by a token's worth and not by everything."""

    def __init__(
        self,
        rows: int = 3,
        vocabulary: int = 100,
        dtype: torch.dtype = torch.float32,
        *,
        purified: bool = True,
        frozen_width: int | None = None,
        gap: float = 0.3,
        bias: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(rows * vocabulary)
        width = frozen_width or WIDTH
        weight = torch.randn(vocabulary, WIDTH) * (4 / WIDTH**0.5)
        common = torch.randn(rows, WIDTH)
        self.student = common.to(dtype)
        self.student_weight = weight.to(dtype)
        self.frozen_weight = None
        if frozen_width is not None:
            self.frozen_weight = (torch.randn(vocabulary, width) * (4 / width**0.5)).to(dtype)
        self.target = (common + gap * torch.randn(rows, WIDTH) if width == WIDTH else torch.randn(rows, width)).to(
            dtype
        )
        self.delta = (gap * torch.randn(rows, width)).to(dtype) if purified else None
        self.biases = [None, None] if bias is None else [torch.randn(vocabulary).to(bias) for _ in range(2)]
        self.row_scale = torch.linspace(0.5, 2.0, rows)
        self.token_ids = torch.arange(rows) * 5 % vocabulary

    def rows(self, options: RowOptions, **vectors: torch.Tensor) -> Rows:
        head = self.student_weight if self.frozen_weight is None else self.frozen_weight
        offset = None
        if self.delta is not None:
            scale = options.delta_scale * options.inv_temperature
            offset = (scale * self.delta.double() @ head.double().mean(0)).float()
        return rows_of(
            self.student, self.target, self.delta, offset,
            student_bias=self.biases[0], frozen_bias=self.biases[1], **vectors,
        )  # fmt: skip

    @property
    def heads(self) -> Heads:
        return Heads(self.student_weight, self.frozen_weight)

    def raw_target(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = (self.student_weight if self.frozen_weight is None else self.frozen_weight).double()
        return self.target.double() @ head.T, None if self.delta is None else self.delta.double() @ head.T

    def expected(self, options: RowOptions) -> tuple[Expected, torch.Tensor]:
        log_q = oracle_target(options, *self.raw_target(), self.biases[1])
        raw = self.student.double() @ self.student_weight.double().T
        return oracle_rows(options, raw, log_q, self.biases[0], self.row_scale), log_q


def _check(
    options: RowOptions, problem: Problem, tolerance: float | None = None, loss_tolerance: float = 1e-5
) -> RowLoss:
    """Every output, guarded and poisoned, against the oracle."""
    rows, vocabulary = problem.student.shape[0], problem.student_weight.shape[0]
    tolerance = tolerance or TOLERANCE[problem.student.dtype]
    guarded: list[Guarded] = []

    def guard(operand):
        inputs = {k: Guarded(x) for k, x in operand._asdict().items() if isinstance(x, torch.Tensor) and x.dim() == 2}
        guarded.extend(inputs.values())
        return operand._replace(**{name: x.view for name, x in inputs.items()})

    operands = guard(problem.rows(options))._replace(token_ids=problem.token_ids, row_scale=problem.row_scale)
    heads = guard(problem.heads)
    dhidden, dweight = poisoned(rows, WIDTH), Guarded(torch.full((vocabulary, WIDTH), 0.25))
    dbias = torch.full((vocabulary + 2,), float("nan"))
    dbias[1:-1] = 0.5
    _, found = stream_divergence(operands, heads, options, Gradients(dhidden.view, dweight.view, dbias[1:-1]))
    for x in guarded:
        x.assert_unchanged()
    dhidden.assert_intact()
    dweight.assert_intact()
    assert dbias[[0, -1]].isnan().all()
    expected, log_q = problem.expected(options)
    close = {"rtol": loss_tolerance, "atol": 2e-6}
    for name in ("divergence", "student_kl", "target_kl"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), **close, msg=name)
    torch.testing.assert_close(found.student_entropy.double(), oracle.entropy(expected.log_p), **close)
    torch.testing.assert_close(found.target_entropy.double(), oracle.entropy(log_q), **close)
    logprob = expected.log_p[torch.arange(rows), problem.token_ids]
    torch.testing.assert_close(found.token_logprob.double(), logprob, **close)
    assert found.argmax_agreement.tolist() == (expected.log_p.argmax(1) == log_q.argmax(1)).float().tolist()
    weight, hidden = problem.student_weight.double(), problem.student.double()
    if vocabulary > 1:
        assert relative_error(dhidden.view, expected.gradient @ weight) < tolerance
        assert relative_error(dweight.view - 0.25, expected.gradient.T @ hidden) < tolerance
        assert relative_error(dbias[1:-1] - 0.5, expected.gradient.sum(0)) < 3 * tolerance
    else:
        assert (dhidden.view == 0).all()
    return found


@pytest.mark.parametrize(
    ("dtype", "purified"), [(DTYPES[0], True), (DTYPES[0], False), (DTYPES[1], True), (DTYPES[2], False)]
)
@pytest.mark.parametrize("beta", [0.0, 0.02, 0.3, 1.0])
def test_dtypes(beta, dtype, purified):
    _check(replace(PLAIN, beta=beta), Problem(dtype=dtype, purified=purified))


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (2, 64), (17, 129)])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_shapes(beta, rows, vocabulary):
    _check(replace(PLAIN, beta=beta), Problem(rows, vocabulary), tolerance=5e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("purified", "bias"), [(True, torch.float32), (True, None), (False, torch.bfloat16)])
def test_transforms(beta, purified, bias):
    """Temperature, scale, bias and soft cap of either stream; the gradient goes back through all of them."""
    _check(replace(TRANSFORMED, beta=beta), Problem(purified=purified, bias=bias), tolerance=5e-5)


@pytest.mark.parametrize(
    "options", [PLAIN, replace(PLAIN, pmi_clip=None, pmi_beta=2.0), replace(TRANSFORMED, beta=0.0)]
)
@pytest.mark.parametrize("purified", [True, False])
def test_a_frozen_head_of_another_width(options, purified):
    _check(options, Problem(frozen_width=24, purified=purified, bias=torch.float32), tolerance=5e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("clips", [(0.01, None), (None, 0.3), (0.01, 0.2)])
def test_clips(beta, clips):
    options = replace(PLAIN, beta=beta, entry_clip=clips[0], token_clip=clips[1])
    problem = Problem(4, gap=1.0)
    problem.target[1] = problem.student[1] + 0.05
    problem.delta[1] *= 0.01
    found = _check(options, problem, tolerance=5e-5)
    if clips[0] is not None:
        assert found.clip_fraction.max() > 0
    if clips == (None, 0.3):
        assert 0 < found.token_clipped.sum() < 4


@pytest.mark.parametrize("options", [replace(PLAIN, beta=0.0), PLAIN, replace(PLAIN, entry_clip=0.1)])
def test_row_scale_zero_contributes_nothing_even_for_nan(options):
    problem = Problem(4)
    expected, _ = problem.expected(options)
    keep = torch.tensor([True, False, False, True])
    gradient = expected.gradient * keep[:, None]
    problem.row_scale[~keep] = 0.0
    problem.student, problem.target, clean = problem.student.clone(), problem.target.clone(), problem.student
    problem.student[1], problem.target[2] = float("nan"), float("inf")
    dhidden, dweight, dbias = poisoned(4, WIDTH), torch.zeros(100, WIDTH), torch.zeros(100)
    rows = problem.rows(options, row_scale=problem.row_scale)
    _, found = stream_divergence(rows, problem.heads, options, Gradients(dhidden.view, dweight, dbias))
    assert (dhidden.view[~keep] == 0).all() and found.divergence[1:3].isnan().all()
    assert relative_error(dhidden.view, gradient @ problem.student_weight.double()) < 2e-5
    assert relative_error(dweight, gradient.T @ clean.double()) < 2e-5
    assert relative_error(dbias, gradient.sum(0)) < 5e-5


@pytest.mark.parametrize(
    ("beta", "clips", "stream"),
    [
        (0.0, (None, None), "student"), (0.0, (0.05, None), "base"), (0.0, (None, 1.0), "difference"),
        (0.3, (None, None), "difference"), (0.3, (0.05, None), "student"), (0.3, (None, 1.0), "base"),
        (1.0, (None, None), "base"), (1.0, (0.05, None), "difference"), (1.0, (None, 1.0), "student"),
    ],
)  # fmt: skip
def test_a_nan_stays_in_its_row(stream, clips, beta):
    """NaN loss and gradient there, finite ones beside it; each pair of the parameters once."""
    problem = Problem(4)
    options = replace(PLAIN, beta=beta, entry_clip=clips[0], token_clip=clips[1])
    rows, heads, clean = problem.rows(options), problem.heads, torch.empty(4, WIDTH)
    _, expected = stream_divergence(rows, heads, options, Gradients(clean))
    dirty = getattr(rows, stream).clone()
    dirty[1, 0] = float("nan")
    dhidden = poisoned(4, WIDTH).view
    _, found = stream_divergence(rows._replace(**{stream: dirty}), heads, options, Gradients(dhidden))
    assert found.divergence[1].isnan() and dhidden[1].isnan().all()
    for x, y in ((found.divergence, expected.divergence), (dhidden, clean)):
        torch.testing.assert_close(x[[0, 2, 3]], y[[0, 2, 3]], rtol=1e-4, atol=1e-5)


def test_minus_infinity_in_a_bias_removes_the_entry():
    problem, keep = Problem(bias=torch.float32), torch.arange(100) % 3 != 0
    for bias in problem.biases:
        bias[~keep] = float("-inf")
    dweight = torch.zeros(100, WIDTH)
    rows = problem.rows(PLAIN)  # the offset is the mean over the whole head, also where entries are removed
    _, found = stream_divergence(rows, problem.heads, PLAIN, Gradients(dweight=dweight))
    rows = rows._replace(student_bias=rows.student_bias[keep], frozen_bias=rows.frozen_bias[keep])
    dense = torch.zeros(int(keep.sum()), WIDTH)
    fewer = Heads(problem.student_weight[keep].contiguous())
    _, expected = stream_divergence(rows, fewer, PLAIN, Gradients(dweight=dense))
    assert (dweight[~keep] == 0).all()
    assert relative_error(dweight[keep], dense) < 1e-5
    for x, y in zip(found[:5], expected[:5], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_alone(beta):
    """To rounding: forward KL sums over other tiles on the way to its gradient."""
    problem, options = Problem(), replace(PLAIN, beta=beta)
    _, found = stream_divergence(problem.rows(options), problem.heads, options, Gradients(torch.empty(3, WIDTH)))
    _, bare = stream_divergence(problem.rows(options), problem.heads, options)
    for a, b in zip(bare[:-1], found[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert bare.token_logprob.isnan().all()


def test_outputs_may_be_had_one_by_one_and_in_16_bits():
    problem = Problem(dtype=torch.bfloat16)
    arguments = (problem.rows(PLAIN), problem.heads, PLAIN)
    dhidden, dweight, dbias = torch.empty(3, WIDTH), torch.zeros(100, WIDTH), torch.zeros(100)
    stream_divergence(*arguments, Gradients(dhidden, dweight, dbias))
    narrow, alone = torch.empty(3, WIDTH, dtype=torch.bfloat16), [torch.zeros(100, WIDTH), torch.zeros(100)]
    stream_divergence(*arguments, Gradients(narrow))
    stream_divergence(*arguments, Gradients(dweight=alone[0]))
    stream_divergence(*arguments, Gradients(dbias=alone[1]))
    # to rounding: nothing promises that another call's matrix products add up in the same order
    torch.testing.assert_close(narrow.float(), dhidden, rtol=EPSILON[torch.bfloat16], atol=1e-6)
    for found, expected in zip(alone, (dweight, dbias), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_results_do_not_depend_on_how_the_work_is_cut(beta, monkeypatch):
    """One program per token tile and one strip, against several: the same to rounding; and the same bits every time."""
    options, problem = replace(PLAIN, beta=beta), Problem(5, 200)

    def run() -> tuple[RowLoss, torch.Tensor, torch.Tensor]:
        dhidden, dweight = torch.empty(5, WIDTH), torch.zeros(200, WIDTH)
        rows = problem.rows(options, token_ids=problem.token_ids)
        _, found = stream_divergence(rows, problem.heads, options, Gradients(dhidden, dweight))
        return found, dhidden, dweight

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1:]), (*again[0], *again[1:]), strict=True))
    monkeypatch.setattr(plan, "processors", lambda device: 1)
    monkeypatch.setattr(loss, "MIN_STRIP", 256)
    whole = run()
    for a, b in zip((*first[0], *first[1:]), (*whole[0], *whole[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_three_token_tiles():
    _check(replace(PLAIN, beta=0.0), Problem(33, 193), tolerance=5e-5)


def test_no_tokens():
    _, found = stream_divergence(rows_of(torch.empty(0, 8), torch.empty(0, 8)), Heads(torch.ones(5, 8)), PLAIN)
    assert [x.shape for x in found] == [(0,)] * len(RowLoss._fields)


def test_token_ids_outside_the_vocabulary_are_nan():
    problem = Problem(4)
    ids = torch.tensor([-1, 99, 100, 2**40])
    _, found = stream_divergence(problem.rows(PLAIN, token_ids=ids), problem.heads, PLAIN)
    assert found.token_logprob.isnan().tolist() == [True, False, True, True]


_COUNT = """
import torch, triton.compiler
triton.compiler.compile = lambda *_, **__: object()  # counted by the key that asks for it
from popsd_kernels.aot.report import select_target
from popsd_kernels.launch import result_rows
from popsd_kernels.rows import Heads, RowLoss, RowOptions, Rows, RowStatistics
from popsd_kernels.streaming import plan, sums, tiles
kernels = (
    tiles.stream_statistics_kernel, tiles.stream_merge_kernel, sums.stream_accumulate_kernel, sums.stream_finish_kernel,
)
for kernel in kernels:
    select_target("sm_90", kernel)
meta, config = torch.device("meta"), plan.TileConfig(32, 64, 32, 4, 2)
for rows, first, last, span, number in ((64, 0, 16, 4, 0.5), (63, 1, 7, 3, 0.3), (1, 3, 4, 1, 0.2), (4097, 3, 4, 1, 0.15)):
    options = RowOptions(number, number, number, number, number, number, delta_scale=number)
    hidden, head = (torch.empty(n, 512, dtype=torch.bfloat16, device=meta) for n in (rows, 1000))
    vector, ids = torch.empty(rows, device=meta), torch.empty(rows, dtype=torch.int64, device=meta)
    operands = Rows(hidden, base=hidden, difference=hidden, offset=vector, token_ids=ids, row_scale=vector)
    call = plan.Call(operands, Heads(head), options, True)
    extent, pitch = tiles.Extent(rows, first, last, span), (rows + 15) // 16 * 16
    partial = torch.empty(5, sums.SUMS, pitch, device=meta)[:, :, :rows]
    gradient = torch.empty(pitch + 16, 1024, dtype=torch.bfloat16, device=meta)
    scaling = sums.Scaling(*result_rows(2, rows, meta))
    strip = sums.Strip(gradient, 1024)
    statistics = RowStatistics(*result_rows(4, rows, meta))
    for planned in (
        call.statistics(config, extent, partial),
        call.merge(partial, result_rows(4, rows, meta)),
        call.accumulate(config, extent, statistics, scaling, plan.parts(partial[first:]), strip),
        call.finish(statistics, partial, scaling, result_rows(len(RowLoss._fields), rows, meta)),
    ):
        planned.compile()
print([len(kernel.device_caches[0][0]) for kernel in kernels])
"""


def test_neither_tokens_nor_annealed_numbers_recompile():
    finished = run_without_interpreter("-c", _COUNT)
    assert finished.stdout.strip() == "[1, 1, 1, 1]", finished.stdout + finished.stderr[-2000:]


def test_every_architecture_has_every_kernel():
    keys = {(kernel, size) for kernel in ("statistics", "sums", "strip") for size in (2, 4)}
    assert set(plan.TABLES) == set(launch.TABLES) and all(set(table) == keys for table in plan.TABLES.values())


def test_tile_spans():
    """Waves of programs, equally long: the fewest parts within 5 % of the best."""
    assert plan.tile_span(128, 1187, 132, 1024) == 1187
    span = plan.tile_span(1, 1187, 132, 1024)
    assert span == 9 and -(-1187 // span) == 132
    assert plan.tile_span(200, 1000, 100, 1024) == 1000
    assert plan.tile_span(133, 1000, 132, 1024) < 600, "two waves for one program too many"
    assert plan.tile_span(1, 5, 132, 2) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(3, 8)}, ValueError, r"rows\.target must have shape \[2, 8\]"),
        ({"student": torch.zeros(2, 1, 8)}, ValueError, "rows.student must be a matrix"),
        ({"heads": Heads(torch.zeros(5, 9))}, ValueError, r"heads\.student must have shape \[5, 8\]"),
        ({"heads": Heads(torch.zeros(5, 8).half())}, TypeError, r"heads\.student must be torch\.float32, got"),
        ({"heads": Heads(torch.zeros(8, 5).T)}, ValueError, r"heads\.student must have unit stride"),
        ({"heads": Heads(torch.zeros(5, 8), torch.zeros(5, 7))}, ValueError, r"heads\.frozen must have shape \[5, 8\]"),
        ({"difference": torch.zeros(2, 8)}, ValueError, "must be given together, got difference alone"),
        ({"token_ids": torch.zeros(2, dtype=torch.int32)}, TypeError, r"rows\.token_ids must be torch\.int64"),
        ({"row_scale": torch.zeros(3)}, ValueError, r"rows\.row_scale must have shape \[2\]"),
        ({"gradients": Gradients(torch.zeros(2, 9))}, ValueError, r"gradients\.dhidden must have shape \[2, 8\]"),
        ({"gradients": Gradients(None, torch.zeros(5, 8).half())}, TypeError, r"gradients\.dweight must be torch\.float32"),
        ({"gradients": Gradients(dbias=torch.zeros(4))}, ValueError, r"gradients\.dbias must have shape \[5\]"),
    ],
)  # fmt: skip
def test_refusals(changes, error, message):
    heads, gradients = changes.pop("heads", Heads(torch.zeros(5, 8))), changes.pop("gradients", Gradients())
    rows = rows_of(torch.zeros(2, 8), torch.zeros(2, 8))._replace(**changes)
    with pytest.raises(error, match=message):
        stream_divergence(rows, heads, PLAIN, gradients)


def test_rows_too_far_apart_for_32_bit_offsets_are_refused(monkeypatch):
    monkeypatch.setattr(loss, "MAX_STRIDE", 9)
    rows = rows_of(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"heads\.student must have rows less than 9 entries apart"):
        stream_divergence(rows, Heads(torch.zeros(5, 9)[:, :8]), PLAIN)


def test_outputs_may_not_be_inputs():
    student = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"gradients\.dhidden shares memory with an input"):
        stream_divergence(rows_of(student, student), Heads(torch.zeros(5, 8)), PLAIN, Gradients(student))
