"""Speed of the sweeps and of the whole losses, to compare one commit with another; beside the peers: ``popsd bench``.

    make bench                                                               # each run is kept in .benchmarks/
    make bench ARGS="--benchmark-compare --benchmark-compare-fail=median:5%" # against the last one kept

The torch backend on the CPU; the kernels where there is a GPU. At a width of 8 the matmuls cost next to nothing, so that
those cases time the sweeps. Not among the tests: continuous integration times nothing.
"""

from dataclasses import replace

import pytest
import torch

from popsd_benchmarks.cases import OURS, Case, Shape
from popsd_benchmarks.measure import seconds_of
from popsd_benchmarks.problems import make_problem
from popsd_benchmarks.providers import PROVIDERS

SHAPES = {
    "cpu": Shape(name="cpu", tokens=256, vocab=32768, width=256),
    "cuda": Shape(name="cuda", tokens=4096, vocab=151936, used=151669, width=2048),
}


@pytest.mark.parametrize("case", ["sweeps", "frozen head", "trainable head"])
@pytest.mark.parametrize("loss", ["purified", "two"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_forward_and_backward(benchmark, device, loss, case):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    shape = replace(SHAPES[device], width=8) if case == "sweeps" else SHAPES[device]
    dtype = "bfloat16" if device == "cuda" else "float32"
    problem = make_problem(
        Case(loss=loss, shape=shape, trainable_head=case == "trainable head", dtype=dtype, device=device)
    )
    step = PROVIDERS[OURS[device]].prepare(problem)

    def finished():
        problem.clear()
        seconds_of(step, device)  # which waits for the device

    benchmark.pedantic(finished, rounds=10, warmup_rounds=2)  # a first launch compiles
