from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import popsd
from popsd_integrations import cli, doctor

NAN = float("nan")


def values(lines):
    return {line.name: line.value for line in lines}


def test_a_sound_installation_passes_its_own_check(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in (popsd.__version__, torch.__version__, "cpu impl=auto", "default 72 MiB", "of float64", "No problems."):
        assert part in printed


def test_a_wrong_answer_is_a_problem(monkeypatch, capsys):
    real = popsd.linear_purified_jsd
    monkeypatch.setattr(
        popsd, "linear_purified_jsd", lambda *a, **k: real(*a, **k)._replace(loss=1.001 * real(*a, **k).loss)
    )
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert (
        "cpu check" in printed and "PROBLEM: loss and gradient within 1.0e-03" in printed and "1 problem(s)" in printed
    )


def test_a_crash_is_reported_not_raised(monkeypatch):
    def broken(*arguments, **options):
        raise OSError("no compiler")

    monkeypatch.setattr(popsd, "linear_purified_jsd", broken)
    (check,) = [line for line in doctor.examine() if line.name == "cpu check"]
    assert check.problem and check.value == "OSError: no compiler"


def test_missing_and_unfit_packages(monkeypatch):
    wanted = ["torch>=2.8", "numpy", 'trl<1.17,>=1.12; extra == "trl"', "peft>=0.19; extra == 'trl'"]
    wanted += ['matplotlib>=3.8; extra == "plots"', 'matplotlib>=3.8; extra == "bench"']
    installed = {"torch": "2.13.0+cpu", "trl": "1.17.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "version", version)
    lines = doctor.packages()
    found = values(lines)
    assert found["torch"] == "2.13.0+cpu"
    assert found["numpy"] == "missing: pip install 'numpy'"
    assert found["trl"] == "1.17.0; popsd needs trl<1.17,>=1.12"
    assert found["extra [trl]"] == "missing peft: pip install 'popsd[trl]'"
    assert found["extra [plots]"] == "missing matplotlib: pip install 'popsd[plots]'"
    assert "pip install liger-kernel" in found["liger-kernel"]
    assert {line.name for line in lines if line.problem} == {"numpy", "trl"}, "a missing extra is a choice"


@pytest.mark.parametrize(
    ("version", "fits"), [("1.11.9", False), ("1.12", True), ("1.12.0", True), ("1.16.4.dev0", True), ("1.17.0", False)]
)
def test_bounds(version, fits):
    assert doctor.within(version, "trl<1.17,>=1.12") is fits
    assert doctor.within(version, "trl")


def test_a_default_workspace_that_does_not_fit_is_a_problem():
    assert not doctor.workspace("cuda:0", 4000.0, 8000.0, 2048.0).problem
    tight = doctor.workspace("cuda:0", 1000.0, 8000.0, 2048.0)
    assert tight.problem and "workspace_mib=500" in tight.value
    assert not doctor.workspace("mps", NAN, NAN, 2048.0).problem


def test_a_gpu_is_described_and_what_fails_on_it_reported(monkeypatch):
    """A GPU that torch announces and cannot use: everything but the check stands."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    found = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * doctor.MIB, 141000 * doctor.MIB))
    lines = doctor.examine()
    found = values(lines)
    assert found["cuda:0"] == "NVIDIA H200, 132 multiprocessors, capability 9.0, launch table sm_90"
    assert found["cuda:0 impl=auto"] == "triton: a GPU, and Triton is installed"
    assert found["cuda:0 workspace"].startswith("default 2048 MiB per call; 1000 of 141000 MiB available: pass")
    assert {"cuda:0 workspace", "cuda:0 check"} <= {line.name for line in lines if line.problem}
