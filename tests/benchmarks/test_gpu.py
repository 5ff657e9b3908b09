"""The two commands in benchmarks/gpu, as far as no GPU is needed: every part at a tiny size, failures, and the plans."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from popsd_benchmarks.cases import SHAPES, Case
from popsd_benchmarks.problems import make_problem
from popsd_benchmarks.report import page
from popsd_benchmarks.results import Cell, Results, Rounds, load

TOOL = """#!{python}
import subprocess, sys
from pathlib import Path

tool, arguments = Path(sys.argv[0]).name, sys.argv[1:]
required = {{"ncu": ("--clock-control", "none", "--csv"), "compute-sanitizer": ("--tool", "memcheck", "--error-exitcode", "9")}}
program = arguments.index(sys.executable)
if absent := [word for word in required[tool] if word not in arguments[:program]]:
    sys.exit(f"{{tool}}: {{' '.join(absent)}} is missing")
if tool == "ncu":
    Path(arguments[arguments.index("--log-file") + 1]).write_text({answer!r}, encoding="utf-8")
sys.exit(subprocess.run(arguments[program:]).returncode)
"""
ANSWER = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","row_statistics_kernel","dram__bytes_read.sum","byte","1,200"
"0","row_statistics_kernel","dram__bytes_write.sum","byte","400"
"0","row_statistics_kernel","gpu__time_duration.sum","ns","2,000"
"1","row_loss_gradient_kernel","dram__bytes_read.sum","byte","1,600"
"1","row_loss_gradient_kernel","dram__bytes_write.sum","byte","200"
"1","row_loss_gradient_kernel","gpu__time_duration.sum","ns","2,000"
"""
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
PARTS = """
import os, sys, time
import environment
from runner import Part, main

def fine(bench):
    for name in ("one", "two"):
        with bench.attempt("fine", name) as wanted:
            if wanted:
                bench.record("fine", name, seconds=0.5)

def raises(bench):
    with bench.attempt("raises", "first"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
    with bench.attempt("raises", "second"):
        raise ValueError("no")
    bench.record("raises", "third")

def breaks(bench):
    with bench.attempt("breaks", "illegal") as wanted:
        if wanted:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.record("breaks", "after")

def dies(bench):
    with bench.attempt("dies", "killer") as wanted:
        if wanted:
            os.kill(os.getpid(), 11)
    bench.record("dies", "after")

def hangs(bench):
    bench.record("hangs", "before")
    with bench.attempt("hangs", "waiting"):
        time.sleep(60)

PARTS = [Part("dies", 60, dies), Part("breaks", 60, breaks), Part("raises", 60, raises),
         Part("absent", 60, fine, tool="no_such_tool --csv"), Part("fine", 60, fine), Part("hangs", 60, hangs)]
if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
"""


@pytest.fixture
def modules(monkeypatch):
    """What the commands are made of, with their paths for the processes that they start."""
    monkeypatch.syspath_prepend(FOLDER)
    import environment
    import measuring
    import predictions
    import runner

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(environment.PATHS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return {"measuring": measuring, "predictions": predictions, "runner": runner}


@pytest.fixture
def run(modules, monkeypatch, capsys):
    """run(script, *arguments): its exit status and what it prints.

    As the script of this process, which has imported torch already: so one server, which imports it again, forks all parts.
    """

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("first.py", ["probe", "correctness", "headline", "profile"]),
        (
            "second.py",
            ["planning", "forward-kl", "width-2560", "accuracy", "dram", "memcheck", "streaming", "single-read", "compiled"],
        ),
        ("second.py", ["step"]),
    ],
)  # fmt: skip
def test_every_part_runs_dry(script, parts, run, tmp_path, monkeypatch):
    """On the CPU by the torch backend; what comes out is what `make report` reads.

    In the place of ncu and compute-sanitizer stand programs that check how they were called and answer in kind.
    """
    (tmp_path / "bin").mkdir()
    for name in ("ncu", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text(TOOL.format(python=sys.executable, answer=ANSWER))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    arguments = ("--dry", "--out", tmp_path / "out", "--work", tmp_path / "work", "--parts", ",".join(parts))
    status, printed = run(FOLDER / script, *arguments)
    for part in parts:
        assert f"== {part}: done," in printed, printed + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    assert status == 0
    assert len(printed.splitlines()) < 60 and len(printed) < 12_000
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and {p.parent for p in files} == {tmp_path / "out"}
    (results,) = (tmp_path / "out").glob("*.json")
    assert "# Measured" in page.page([(results, load(results))], tmp_path / "RESULTS.md")
    kept = {(r["part"], r["status"]) for r in load(results).records}
    for part in {"probe", "dram", "step"}.intersection(parts):
        assert (part, "ok") in kept and (part, "failed") not in kept


def test_every_part_is_among_those(modules):
    import first
    import second

    (tried,) = (mark.args[1] for mark in test_every_part_runs_dry.pytestmark if mark.name == "parametrize")
    names = [(script, part) for script, parts in (getattr(x, "values", x) for x in tried) for part in parts]
    assert sorted(names) == sorted((f"{x.__name__}.py", part.name) for x in (first, second) for part in x.PARTS)


def test_a_part_that_fails_fails_alone_and_is_taken_up_again(run, modules, tmp_path, monkeypatch):
    script = tmp_path / "parts.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n" + PARTS)
    folders = ("--out", tmp_path / "out", "--work", tmp_path / "work")
    status, _ = run(script, "--dry", *folders, "--parts", "dies,breaks,raises,absent,fine")
    assert status == 4
    monkeypatch.setattr(modules["runner"], "DRY_SECONDS", 6.0)  # the server is there: a fork takes milliseconds
    status, _ = run(script, "--dry", *folders, "--parts", "hangs")
    assert status == 1
    (path,) = (tmp_path / "out").glob("*.json")
    rows = {f"{row['part']} {row['name']}": row for row in load(path).records}
    assert "stopped after" in rows["parts hangs"]["note"] and rows["hangs before"]["status"] == "ok"
    assert rows["hangs waiting"]["status"] == "stopped"
    for part, culprit in (("dies", "killer"), ("breaks", "illegal")):
        assert rows[f"{part} {culprit}"]["status"] == "failed", "begun again without it"
        assert rows[f"{part} after"]["status"] == "ok" and culprit in rows[f"parts {part}"]["note"]
    assert "its process died" in rows["dies killer"]["note"] and "illegal memory" in rows["breaks illegal"]["note"]
    statuses = [rows[f"raises {name}"]["status"] for name in ("first", "second", "third")]
    assert statuses == ["out of memory", "failed", "ok"]
    assert rows["parts absent"]["note"] == "left out: no no_such_tool"
    assert rows["fine two"]["seconds"] == 0.5
    elsewhere = ("--out", tmp_path / "elsewhere", "--work", tmp_path / "work")
    status, printed = run(script, "--dry", *elsewhere, "--parts", "fine,raises")
    assert status == 1 and "== fine: done, 0 s" in printed
    (path,) = (tmp_path / "elsewhere").glob("*.json")
    assert len(load(path).meta["continued"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dry", "--out", "OUT", "--parts", "probe,tables"],
            "--parts: expected some of probe, correctness, headline",
        ),
        (["--out", "OUT"], "expected a GPU that torch sees; got none. --dry runs every part on a CPU"),
        (["--dry", "--out", "FILE/below"], "--out: expected a folder that can be written to; got"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, modules, capsys):
    import first

    (tmp_path / "file").touch()
    places = {"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    given = [x.replace("FILE", places["FILE"]).replace("OUT", places["OUT"]) for x in arguments]
    with pytest.raises(SystemExit) as stopped:
        modules["runner"].main("", first.PARTS, given)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")


def test_what_cannot_run_is_left_out(modules, monkeypatch, tmp_path):
    runner = modules["runner"]
    monkeypatch.setattr(runner, "card", lambda: {"gib": 24.0, "capability": [8, 9]})
    monkeypatch.setattr(runner, "describe", lambda device: {"device": "NVIDIA L4", "date": "2026-01-01"})
    session = runner.Session(tmp_path, tmp_path, dry=False)
    assert session.path.name == "l4-2026-01-01.json"
    part = runner.Part("x", 60)
    assert session.run(part, 1.0) == "left out: no time"
    # eight processes of 8 GiB would not fit: two do
    command = session.command(part, "PYTEST WORKERS -m 'not alone'")
    assert command[command.index("-n") + 1] == "2"
    assert command[-2:] == ["-m", "not alone"]


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("GeForce RTX 4090", "geforce-rtx-4090")],
)
def test_a_card_has_a_short_name(device, name, modules):
    assert modules["runner"].slug(device) == name


def test_predictions_are_those_written_down(modules):
    """kernels/README.md and this table say the same; milliseconds on an H100 for N = 8192, V = 151,936, JSD."""
    predictions = modules["predictions"]
    card = predictions.rates("NVIDIA H100 80GB HBM3")
    expected = {"qwen3-1.7b": (29.2, 45.4, 35.8), "qwen3-4b": (36.0, 52.2, 42.7), "qwen3-8b": (56.6, 72.8, 63.3)}
    for shape, row in expected.items():
        case = Case(loss="purified", shape=SHAPES[shape], dtype="bfloat16", device="cuda")
        for provider, ms in zip(("matmuls", "popsd-triton", "popsd-single-read"), row, strict=True):
            cell = Cell(part="table", provider=provider, case=case, seconds=Rounds.of([ms / 1e3]))
            assert predictions.milliseconds(cell, card) == pytest.approx(ms, rel=0.005), (shape, provider)
    assert predictions.fill(1664, 2048, 132) == pytest.approx(0.788, abs=1e-3)
    assert predictions.fill(2048, 2560, 132) == pytest.approx(0.606, abs=1e-3)
    results = Results({"device": "NVIDIA H100"}, [cell])
    assert "popsd-single-read 63.3 (63.0)" in predictions.comparison(results)[1]
    # on an H200 two distributions move 10 bytes an entry in 3.3 ms, and 100 instructions an entry take 4.3
    fast, two = predictions.CARDS["H200"], Case(loss="two", shape=SHAPES["qwen3-1.7b"], dtype="bfloat16", device="cuda")
    single, floor = (Cell(part="table", provider=name, case=two) for name in ("popsd-single-read", "matmuls"))
    sweep = predictions.milliseconds(single, fast) - predictions.milliseconds(floor, fast)
    assert sweep == pytest.approx(8192 * 151936 * 100 / predictions.ISSUED * 1e3)


def test_rows_of_ones_own_take_effect(modules, monkeypatch):
    """Popsd splits the tokens as it is told; where nothing asks for the plan, nothing is measured."""
    measuring = modules["measuring"]
    problem = make_problem(Case(loss="two", shape=SHAPES["tiny"]))
    calls, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: calls.append(a.shape[0]) or mm(a, b, **out))
    measuring.Planned("planned", impl="torch", rows=(16, 16)).prepare(problem)()
    assert calls == [2 * 16] * 3, "a chunk projects student and target at once"
    monkeypatch.setattr(measuring.Popsd, "prepare", lambda self, problem: lambda: None)
    with pytest.raises(AssertionError, match="was not asked"):
        measuring.Planned("planned", impl="torch", rows=(16, 16)).prepare(problem)()


def test_what_ncu_says_is_read(modules, tmp_path):
    results = Results({}, records=[{"part": "probe", "name": "copy", "status": "ok", "gb_per_s": 2.0}])
    (tmp_path / "ncu.csv").write_text(ANSWER)
    bench = modules["runner"].Bench(results, tmp_path / "results.json", dry=True)
    modules["measuring"].read_ncu(bench, tmp_path)
    first, second = results.records[1:]
    assert (first["name"], first["gb_per_s"], first["share_of_copy"]) == ("row_statistics_kernel", 0.8, 0.4)
    assert second["gb"] == pytest.approx(1.8e-6)
    modules["measuring"].read_ncu(bench, tmp_path / "elsewhere")
    assert results.records[-1]["status"] == "failed"


def test_the_suite_is_read_by_its_last_lines(modules, tmp_path):
    runner = modules["runner"]
    part, session = runner.Part("correctness", 60), runner.Session(tmp_path, tmp_path, dry=True)
    lines = [
        {"case": "a", "impl": "triton", "errors": {}, "passed": False, "exception": "its process died"},
        {"case": "a", "impl": "triton", "errors": {"loss": 0.5}, "passed": True},
        {"case": "b", "impl": "triton", "errors": {"loss": 1.5, "dhidden": 0.2}, "passed": False},
    ]
    session.cases_of(part).write_text("\n".join(map(json.dumps, lines)) + '\n{"case": "cut of')
    runner.read_cases(session.bench(), part.name, session.cases_of(part))
    (row,) = [row for row in load(session.path).records if row["name"] == "cases"]
    assert (row["passed"], row["failed"], row["worst"], row["share_of_bound"]) == (1, 1, "b", 1.5)
    assert row["status"] == "failed" and row["failures"] == {"b": {"loss": 1.5, "dhidden": 0.2}}
