"""Speed of the sweeps and of the whole losses, to compare one commit with another; beside the peers: ``popsd bench``.

    make bench                                                               # each run is kept in .benchmarks/
    make bench ARGS="--benchmark-compare --benchmark-compare-fail=median:5%" # against the last one kept

Torch on the CPU; kernels where there is a GPU. Not among the tests: continuous integration times nothing.
"""

import pytest
import torch

import popsd
from popsd.config import Impl
from popsd.engine.backends import SWEEP_ELEMENTS, backend_for
from popsd_benchmarks.cells import Case, Shape
from popsd_benchmarks.problems import make_problem
from popsd_kernels.rows import RowOptions, Rows

SIZES = {
    "cpu": Shape(name="cpu", tokens=256, vocab=32768, width=256),
    "cuda": Shape(name="cuda", tokens=4096, vocab=151936, used=151669, width=2048),
}
GPU_ROWS = 512
OPTIONS = RowOptions()


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def impl(request):
    if request.param == "triton" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Impl(request.param)


@pytest.fixture
def device(impl):
    return "cuda" if impl is Impl.TRITON else "cpu"


@pytest.fixture
def streams(device):
    """Student, base and difference of one call of a sweep [C, V], and a buffer for the gradient."""
    vocab = SIZES[device].vocab
    rows = GPU_ROWS if device == "cuda" else SWEEP_ELEMENTS // vocab
    generator = torch.Generator(device).manual_seed(0)
    base = 3 * torch.randn(rows, vocab, generator=generator, device=device)
    student, delta = (0.1 * torch.randn(rows, vocab, generator=generator, device=device) for _ in range(2))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return base + student, base, delta, torch.empty(rows, vocab, dtype=dtype, device=device)


def measure(benchmark, device, step, setup=None, rounds=30):
    """A few warm-ups, for a first launch compiles; each round ends when the device has finished."""

    def finished(*arguments):
        step(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, setup=setup, rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("target", ["given", "composed"])
def test_row_sweeps(benchmark, impl, device, streams, target):
    student, base, delta, gradient = streams
    rows, backend = Rows(student, target=base), backend_for(impl, student.device)
    if target == "composed":
        rows = Rows(student, base=base, difference=delta, offset=delta.mean(dim=1))

    def step(fresh):
        backend.sweeps(rows._replace(difference=fresh), OPTIONS, gradient=gradient)

    # the kernels put the composed target in the place of the difference
    measure(benchmark, device, step, lambda: ((delta.clone() if target == "composed" else None,), {}))


def test_row_statistics(benchmark, impl, device, streams):
    student, base, *_ = streams
    rows, backend = Rows(student, target=base), backend_for(impl, student.device)
    measure(benchmark, device, lambda: backend.statistics(rows, OPTIONS))


def test_logit_difference(benchmark, impl, device, streams):
    teacher, reference, out, _ = streams
    rows, backend = Rows(teacher, teacher=teacher, reference=reference), backend_for(impl, teacher.device)
    measure(benchmark, device, lambda: backend.logit_difference(rows, OPTIONS, center=True, out=out))


@pytest.mark.parametrize("trainable_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("loss", ["purified", "two"])
def test_forward_and_backward(benchmark, impl, device, loss, trainable_head):
    dtype = "bfloat16" if device == "cuda" else "float32"
    shape = SIZES[device]
    problem = make_problem(Case(loss=loss, shape=shape, trainable_head=trainable_head, dtype=dtype, device=device))
    hidden, common = problem.hidden, {"config": problem.config, "reduction": "sum", "impl": impl}

    def step():
        problem.clear()
        if loss == "purified":
            out = popsd.linear_purified_jsd(hidden, problem.head, **common)
        else:
            out = popsd.linear_jsd(hidden.student, problem.head, hidden.teacher, **common)
        out.loss.backward()

    measure(benchmark, device, step, rounds=10)
