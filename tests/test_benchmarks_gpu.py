"""The scripts in benchmarks/gpu: what of them needs no GPU."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"


def task(folder, name):
    (folder / name).touch()
    if name == "dies":
        os._exit(1)
    return {"exception": "AcceleratorError: CUDA error: an illegal access"} if name == "breaks" else {"name": name}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_task_that_dies_or_breaks_its_process_costs_no_other(processes, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    from pool import run_all

    names = ["one", "dies", "breaks", "two", "three"]
    found = dict(run_all(functools.partial(task, tmp_path), names, processes))
    assert found == {name: {"name": name} for name in ("one", "two", "three")} | {
        "dies": {"exception": "its process died"},
        "breaks": {"exception": "AcceleratorError: CUDA error: an illegal access"},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_the_check_runs_its_cases_in_several_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import check

    out = tmp_path / "check.json"
    small = ["--device", "cpu", "--impl", "torch", "--tokens", "8", "--vocab", "97", "--width", "16"]
    monkeypatch.setattr(sys, "argv", ["check.py", *small, "--only", "logits", "--processes", "2", "--out", str(out)])
    assert check.main() == 0
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 18 and all(case["passed"] for case in cases.values())
    assert "18 passed, 0 failed" in capsys.readouterr().out
    monkeypatch.setattr(check, "run_case", lambda size, name: {"errors": {"loss": 1.01}, "seconds": 0.0})
    monkeypatch.setattr(sys, "argv", ["check.py", *small, "--only", "logits"])
    assert check.main() == 18


def test_a_part_that_fails_or_takes_too_long_is_told_of(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    import all as everything

    log = tmp_path / "log.txt"

    def run(code, seconds=120.0):
        return everything.run(everything.Part("x", 1.0, [sys.executable, "-c", code]), log, seconds)

    assert run("import popsd, popsd_kernels, popsd_benchmarks; print('fine')") == "done"
    assert run("print('worse'); raise SystemExit(3)") == "exit status 3"
    assert run("import time; time.sleep(60)", seconds=0.5) == "stopped after 0 s"
    assert log.read_text() == "fine\nworse\n"
    absent = everything.Part("x", 1.0, ["no-such-program"])
    assert everything.run(absent, log, 1.0) == "left out: no no-such-program"
    for part in everything.parts(tmp_path, 540.0):
        assert Path(part.command[1 if part.name != "memcheck" else 6]).is_file(), part
