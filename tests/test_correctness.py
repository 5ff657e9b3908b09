"""The matrix of calls, options, heads, dtypes and sizes (matrix.py) against the float64 oracle (judge.py), backend by backend.

On CPU every case runs through the torch bodies, and a few of each kind through the kernels in Triton's interpreter. With
``--device cuda`` every case runs through the compiled kernels, at sizes that take the paths of real ones.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from judge import run
from kernel_helpers import BLOCK
from matrix import CASES, GPU_SIZES, INTERPRETED_SIZES, TORCH_SIZES


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    on_gpu = metafunc.config.getoption("device") == "cuda"
    if metafunc.function is test_torch_matches_the_oracle:
        cases = [case for case in CASES if case.strategy == "chunked" and not case.gpu_only and not on_gpu]
    else:
        cases = [case for case in CASES if on_gpu or case.thin]
    metafunc.parametrize("case", [pytest.param(case, id=case.name, marks=marks(case)) for case in cases])


def marks(case):
    found = {"alone": case.place == "beyond", "single_read": case.strategy == "single_read", "memcheck": case.memcheck}
    return [getattr(pytest.mark, name) for name, wanted in found.items() if wanted]


def test_torch_matches_the_oracle(case, judged):
    size = TORCH_SIZES[case.place]
    judged(case.name, "torch", lambda: run(case, size, "torch", "cpu"), **size._asdict())


def test_triton_matches_the_oracle(case, device, judged, monkeypatch):
    size = GPU_SIZES[case.place]
    if device == "cpu":
        from popsd_kernels import launch

        size = INTERPRETED_SIZES[case.place]
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(launch, "shipped_config", lambda kernel, device: launch.LaunchConfig(BLOCK, 4, 4))
        monkeypatch.setattr(launch, "too_few_rows", lambda *_: case.place == "few")  # which it takes from the GPU
    judged(case.name, "triton", lambda: run(case, size, "triton", device), **size._asdict())


# What follows looks at the machinery of conftest.py, with cases that fail as on a GPU.

TESTS = Path(__file__).resolve().parent
CONFTEST = """
import importlib.util
spec = importlib.util.spec_from_file_location("shared", {path!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
shared.find_spec = lambda name: None  # no kernels here: workers start sooner
globals().update({{name: value for name, value in vars(shared).items() if not name.startswith("__")}})
"""
FAKE = """
import os
import pytest

def measure(case):
    if case == "dies":
        os._exit(1)
    if case == "breaks":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return {"loss": {"wrong": 1.5, "nan": float("nan")}.get(case, 0.5)}

@pytest.mark.parametrize("case", ["fine", "wrong", "breaks", "nan", "dies", "a", "b", "c"])
def test_triton_matches_the_oracle(case, device, judged):
    judged(case, "triton", lambda: measure(case), tokens=3)

def test_of_the_cpu_alone():
    pass
"""


@pytest.fixture
def fake(tmp_path):
    """Runs the fake cases; returns the exit status and the lines of the results file."""
    (tmp_path / "conftest.py").write_text(CONFTEST.format(path=str(TESTS / "conftest.py")))
    (tmp_path / "test_fake.py").write_text(FAKE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run_fake(*arguments):
        file = tmp_path / "results.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--results", str(file), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done, [json.loads(line) for line in file.read_text().splitlines()]

    return run_fake


def test_a_process_that_breaks_or_dies_costs_its_case_alone_and_a_rerun_goes_on(fake):
    pytest.importorskip("xdist")
    done, lines = fake("-n", "2")
    assert done.returncode == 1, done.stdout
    assert len(lines) == 8
    found = {line["case"]: line for line in lines}
    assert {name for name, line in found.items() if line["passed"]} == {"fine", "a", "b", "c"}
    assert found["fine"]["errors"] == {"loss": 0.5} and found["fine"]["tokens"] == 3
    assert "CUDA error" in found["breaks"]["exception"] and "died" in found["dies"]["exception"]
    assert "exception" not in found["wrong"] and "exception" not in found["nan"]
    done, lines = fake("-n", "0", "--resume-results")  # one process, which its CUDA error ends
    assert "a CUDA error" in done.stdout
    assert [line["case"] for line in lines[8:]] == ["wrong", "breaks"]
    done, lines = fake("-n", "0", "-k", "fine or wrong")
    assert [line["case"] for line in lines[10:]] == ["fine", "wrong"]
