"""The workspace plan: budgets kept, multiprocessors filled; and which vocabulary rows the matmuls read."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import popsd
from popsd import Head, PurifiedConfig
from popsd.engine import workspace
from popsd.engine.workspace import (
    CPU_WORKSPACE_MIB,
    GPU_WORKSPACE_MIB,
    Columns,
    Work,
    fill,
    filling_rows,
    plan_rows,
)
from popsd.testing import make_head, make_hidden, relative_l2, true_purified

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20
PROCESSORS = (108, 114, 132, 148, 304)
"""A100, H100 PCIe, H100 SXM, B200, MI300X."""


def work_of(vocab=151936, width=2048, streams=3, size=2, *, with_dweight=False) -> Work:
    return Work(vocab, width, streams, size, 4 * streams * vocab, 2 * vocab if size == 2 else 0, True, with_dweight)


def bytes_of(plan, tokens: int, work: Work) -> int:
    return min(plan[0], tokens) * work.logit_bytes + min(plan[1], tokens) * work.gradient_bytes


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
@pytest.mark.parametrize("mib", [None, 0.001, 8.0, 1024.0])
def test_the_plan_keeps_to_its_budget(device, mib, h100):
    for tokens, vocab in itertools.product([0, 1, 2, 17, 130, 513, 8192, 65536], [97, 32768, 151936, 262144]):
        works = (work_of(vocab), work_of(vocab, 64, 2, 4), Work(vocab, logit_bytes=4 * vocab))
        keeps_to_its_budget(tokens, device, mib, works)


def keeps_to_its_budget(tokens, device, mib, works):
    for work in works:
        chunk, rows = plan = plan_rows(tokens, work, torch.device(device), mib)
        assert 1 <= chunk <= max(tokens, 1) and rows >= chunk and rows % chunk == 0
        budget = (mib or (CPU_WORKSPACE_MIB if device == "cpu" else GPU_WORKSPACE_MIB)) * MIB
        assert chunk == 1 or bytes_of(plan, tokens, work) <= budget


def test_the_plans_on_a_cpu_are_what_they_were():
    def plan(*arguments, **options):
        return plan_rows(*arguments, **options)[0]

    assert plan(512, work_of(32784, 64, 3, 4), CPU) == 176
    assert plan(512, work_of(32784, 64, 4, 4), CPU, decompose=True) == 176, "the head is read no more often"
    assert plan(2048, work_of(151936, 64, 3, 4), CPU) == 41
    assert plan(4096, work_of(32768, 64, 3, 4), CPU, 96.0) == 256
    assert plan(60, work_of(211, 24, 3, 4), CPU, 0.004) == 1
    assert plan(60, work_of(211, 24, 3, 4), CPU, 0.05) == 20


@pytest.mark.parametrize(
    ("width", "mib", "plan", "filled"),
    [
        (2048, 2048, (512, 2048), 0.97),
        (2560, 2048, (832, 1664), 0.98),
        (4096, 2048, (512, 1024), 0.97),
        (2048, 1024, (128, 2048), 0.97),
        (2560, 1024, (128, 1664), 0.98),
        (4096, 1024, (256, 1024), 0.97),
        (2048, 400, (80, 880), 0.42),
        (2560, 400, (80, 880), 0.53),
        (4096, 400, (80, 880), 0.85),
    ],
)
def test_plans_of_an_h100(width, mib, plan, filled):
    assert filling_rows(8192, work_of(width=width), mib * MIB, 132) == plan
    assert fill(plan[1], width, 132) == pytest.approx(filled, abs=0.006)
    assert workspace.gradient_fill(plan, 8192, work_of(width=width), 132) > filled - 0.06


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("width", [1024, 2048, 2560, 3072, 3584, 4096, 5120, 8192])
def test_multiprocessors_are_filled_where_a_plan_can(processors, width):
    """The gradient's products to 90 %, unless every plan that does so takes longer by what it costs the projections."""
    tokens, reached = 8192, 0
    for mib, vocab in itertools.product([400, 1024, 2048], [32768, 128256, 151936, 262144]):
        work = work_of(vocab, width)
        plan = filling_rows(tokens, work, mib * MIB, processors)
        times = {
            x: workspace.predicted_time(x, tokens, work, processors)
            for chunk in range(128, 2049, 128)
            for rows in range(chunk, workspace.GRADIENT_ROWS + 1, chunk)
            if bytes_of(x := (chunk, rows), tokens, work) <= mib * MIB
        }
        filling = [x for x in times if workspace.gradient_fill(x, tokens, work, processors) >= 0.9]
        time = workspace.predicted_time(plan, tokens, work, processors)
        assert time <= 1.03 * min(times.values(), default=time)
        if workspace.gradient_fill(plan, tokens, work, processors) >= 0.9:
            reached += 1
        else:
            assert all(times[x] > time for x in filling)
    assert reached >= 5 or processors != 132 or width < 2048


def test_fill_counts_whole_waves():
    assert fill(2048, 2048, 132) == 128 / 132
    assert fill(1664, 2048, 132) == 104 / 132
    assert fill(2048, 2560, 132) == 160 / 264
    assert fill(1, 1, 132) == 1 / 132


def test_a_head_that_is_trained_is_accumulated_in_few_pieces():
    """dW is read and written once per gradient buffer, whatever its rows: as long as a thousand of them take to multiply."""
    plan = filling_rows(8192, work_of(width=4096, with_dweight=True), 2048 * MIB, 132)
    assert plan[1] >= 1024


@pytest.mark.parametrize(
    ("vocab", "rows", "columns"),
    [
        (151669, 151936, Columns(151680, 151664)),
        (151936, 151936, Columns(151936, 151936)),
        (50257, 50257, Columns(50257, 50256)),
        (50257, 50264, Columns(50264, 50256)),
        (1000, 1003, Columns(1000, 1000)),
        (5, 7, Columns(5, 5)),
    ],
)
def test_matmuls_read_aligned_vocabulary_rows(vocab, rows, columns):
    assert workspace.vocabulary_columns(vocab, rows, CUDA) == columns
    assert workspace.vocabulary_columns(vocab, rows, CPU) == Columns(vocab, vocab)


@pytest.mark.parametrize("rows", [151, 152, 256, 300])
@pytest.mark.parametrize("options", [{}, {"pmi_clip": None}, {"center": False}, {"plausibility": 0.05}], ids=str)
@pytest.mark.parametrize("two_heads", [False, True])
def test_rows_beyond_the_vocabulary_may_hold_anything(rows, options, two_heads, monkeypatch):
    """Also where the projections read them, and where float32 gradients take the place of logits beside theirs."""
    vocab, tokens = 151, 9
    hidden, bias = make_hidden(tokens, 16, 0.4), torch.randn(300)
    weights = [make_head(300, 16, seed=seed).weight for seed in (1, 2)]
    for weight in weights:
        weight[vocab:] = float("nan")
    config, upstream = PurifiedConfig(vocab_size=vocab, **options), torch.rand(tokens) + 0.5
    clean = [Head(weight[:vocab], bias[:vocab]) for weight in weights]
    truth = true_purified(hidden, (clean[0], clean[two_heads]), config, upstream)
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(workspace, "ALIGNED_DEVICES", devices)
        own = Head(weights[0][:rows].clone().requires_grad_(), bias[:rows].clone().requires_grad_())
        frozen = Head(weights[1], bias) if two_heads else None
        leaf = hidden.student.clone().requires_grad_()
        output = popsd.linear_purified_jsd(
            hidden._replace(student=leaf), own, frozen, config=config, weights=upstream, reduction="sum", impl="torch",
            workspace_mib=0.01,
        )  # fmt: skip
        output.loss.backward()
        assert relative_l2(output.divergence, truth.loss) < 1e-5
        assert relative_l2(leaf.grad, truth.dhidden) < 2e-5
        assert relative_l2(own.weight.grad[:vocab], truth.dweight) < 2e-5
        assert relative_l2(own.bias.grad[:vocab], truth.dbias) < 2e-5
        assert (own.weight.grad[vocab:] == 0).all() and (own.bias.grad[vocab:] == 0).all()
        results.append(leaf.grad)
    assert relative_l2(results[1], results[0]) < 1e-6
