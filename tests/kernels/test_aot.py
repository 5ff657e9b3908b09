"""Every shipped kernel compiles for every listed GPU, within its limits; the report is what a user would see."""

from __future__ import annotations

import ast
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_helpers import run_without_interpreter

import popsd_kernels
from popsd_kernels import launch
from popsd_kernels.aot import cases, command, report
from popsd_kernels.aot.streaming_cases import StreamCase
from popsd_kernels.streaming import plan

# SASS instructions per vocabulary entry over both sweeps, all nine results included (sm_90, Triton 3.7.1: 40.0, 48.1, 58.1).
BUDGET = {"forward KL": 40.0, "reverse KL": 49.0, "JSD": 59.0}


# Device functions whose max.f32 may drop a NaN, since it reaches the results another way. Any other, and every minimum
# (entry_clip's stands in `accumulate` too), takes propagate_nan=tl.PropagateNan.ALL, which costs no instruction on NVIDIA GPUs.
DROPS_NAN = {
    "lse_accumulate": "the exponential of the same entry makes the sum NaN",
    "lse_accumulate_sum": "as lse_accumulate",
    "lse_finish": "tops are finite where lse_accumulate made them, and the sums beside them hold the NaN",
    "_store_normalisers": "single read: as lse_accumulate",
    "accumulate": "largest log p + log q, compared with the NaN normalisers of the same row",
    "finish_row": "the same over the row",
    "_add_tile": "the same over a tile",
    "_store_sums": "the same over a slice",
    "stream_statistics_kernel": "as lse_accumulate",
    "_likelier": "a pivot: the sums about it hold the NaN, whatever it is",
    "_highest": "a threshold for others' entries; the stream that holds the NaN is added to the difference it masks",
}
COMPILED = """
import json, re, sys, tempfile
from pathlib import Path
from popsd_kernels.aot import cases, command, report
architecture, wanted = sys.argv[1:]
shipped, found = cases.shipped_cases(), []
if (architecture, wanted) == ("sm_90", "largest"):
    cubin = Path(tempfile.mkdtemp()) / "kernel.cubin"
    for case in shipped:
        planned = case.launch(case.config(architecture), True)
        report.select_target(architecture, planned.kernel)
        compiled = planned.compile()
        cubin.write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", report._cuobjdump(cubin, "--dump-resource-usage")))
        numbers = {name: int(number) for name, number in usage.items()}
        numbers |= {"threads": 32 * planned.config.num_warps, "shared": compiled.metadata.shared}
        place, drops = "", set()
        for line in compiled.asm["ptx"].splitlines():
            if re.match(r"\\s*\\.loc\\s", line):
                place = line.partition("//")[2]
            elif drop := re.search(r"\\b(min|max)(\\.ftz)?\\.f32\\b", line):
                drops.add((drop[1], place.strip()))
        found.append({"case": f"{case.kernel} {case.flags}", "drops": sorted(drops), **numbers})
if wanted == "largest":
    chosen = {case: case for case in shipped if case.flags in MAIN}
    for case in shipped:
        kernel = case.kernel, case.launch(case.config(architecture), False).kernel.__name__
        chosen[kernel] = max(chosen.get(kernel, case), case, key=lambda case: len(case.flags))
    command.shipped_cases = lambda: list(dict.fromkeys(chosen.values()))
status = command.main(["--arch", architecture])
print(json.dumps(found))
sys.exit(status)
""".replace("MAIN", str(("purified", *BUDGET)))
"""The command for one architecture: every case, or the main path and of each kernel the case with the most flags, whose
registers run out first. For sm_90 a last line has every case all the same, with its resources and the places of its min.f32
and max.f32: that needs no disassembler, which takes most of a second to start."""


def _instructions(report: str, kernel: str, flags: str) -> float:
    line = next(x for x in report.splitlines() if re.search(rf"{kernel}\s+{re.escape(flags)}\s+regs", x))
    found = re.search(r"instructions/entry ([\d.]+(?: \+ [\d.]+)*)", line)
    assert found is not None, line
    return sum(map(float, found[1].split(" + ")))


COMPILATIONS = [
    ("sm_90", "largest"),
    ("gfx942", "largest"),
    *(pytest.param(x, "all", marks=pytest.mark.slow) for x in ("sm_90", "gfx942", "sm_80", "sm_100", "sm_120")),
]
"""One NVIDIA and one AMD GPU always: what failed on one alone has been spills, which the largest cases show."""


@pytest.fixture(scope="module")
def reports(request):
    """What selected tests ask for, compiled: as many at a time as there are processors."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = sorted({(x["architecture"], x["wanted"]) for x in calls if "architecture" in x} | {("sm_90", "largest")})
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = pool.map(lambda names: run_without_interpreter("-c", COMPILED, *names, timeout=1800.0), asked)
        return dict(zip(asked, found, strict=True))


def test_every_architecture_is_compiled():
    values = [getattr(x, "values", x) for x in COMPILATIONS]
    assert {architecture for architecture, wanted in values if wanted == "all"} == set(report.DEVICES)


@pytest.mark.parametrize(("architecture", "wanted"), COMPILATIONS)
def test_shipped_kernels_compile_without_spills(architecture, wanted, reports):
    finished = reports[architecture, wanted]
    assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
    lines = [line for line in finished.stdout.splitlines() if line.startswith(f"{architecture} ")]
    if wanted == "all":
        assert len(lines) == len(cases.shipped_cases())
    assert {line.split()[1] for line in lines} == {case.kernel for case in cases.shipped_cases()}
    for line in lines:
        # exact float32 products run on the ordinary units of NVIDIA; gfx942 has float32 matrix units
        product = " stream_" in line and ("float32" not in line or architecture == "gfx942")
        assert f"matrix units {'yes' if product else 'no'}" in line, line
    if architecture == "sm_90":
        first = _instructions(finished.stdout, "statistics", "purified")
        for mode, budget in BUDGET.items():
            total = first + _instructions(finished.stdout, "loss_gradient", mode)
            assert 20 < total <= budget, f"{mode}: {total} instructions per entry"


def test_every_flag_compiles_within_the_limits(reports):
    device, found = report.DEVICES["sm_90"], json.loads(reports["sm_90", "largest"].stdout.splitlines()[-1])
    assert len(found) == len(cases.shipped_cases())
    for case in found:
        assert case["STACK"] == case["LOCAL"] == 0, f"{case}: registers were spilled"
        made = report.Report(case["REG"], 0, case["shared"], case["threads"], (), False)
        assert not report.problems(made, device), case


def _functions():
    """{file name: [(first line, last line, function)]} of the kernels' package. Line numbers of a compiled kernel come with
    the file's name alone, so no two files with functions may share theirs."""
    found = {}
    for path in Path(popsd_kernels.__file__).parent.rglob("*.py"):
        assert path.name not in found or path.name.startswith("__"), f"two files called {path.name}"
        nodes = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]
        found[path.name] = [(node.lineno, node.end_lineno, node.name) for node in nodes]
    return found


def _innermost(place, functions):
    """The device function of ours that an instruction comes from.

    place: ``standard.py:170:27 @[ standard.py:191:40 @[ primitives.py:110:22 @[ row_loss.py:87:69 ...``, innermost first.
    """
    names = [
        name
        for file, line in re.findall(r"(\w+\.py):(\d+):", place)
        for first, last, name in functions.get(file, ())
        if first <= int(line) <= last
    ]
    helpers = {"lane_max"}  # they belong to whoever calls them
    return next((name for name in names if name not in helpers), place)


def test_no_minimum_or_maximum_drops_a_nan_unless_it_reaches_the_row_another_way(reports):
    """min.f32 and max.f32 return the operand that is not NaN; NumPy, and so the interpreter, returns the NaN. So tests in the
    interpreter cannot see a NaN vanish under a clip (a NaN row reported 102 and a gradient of zeros on compiled code)."""
    finished = reports["sm_90", "largest"]
    assert finished.returncode == 0, finished.stderr[-2000:]
    functions, dropping = _functions(), {}
    for case in json.loads(finished.stdout.splitlines()[-1]):
        for instruction, place in case["drops"]:
            dropping.setdefault((instruction, _innermost(place, functions)), set()).add(case["case"])
    allowed = {("max", name) for name in DROPS_NAN}
    assert not {key: cases for key, cases in dropping.items() if key not in allowed}
    seen = {name for _, name in dropping}
    assert {"lse_accumulate", "lse_finish", "accumulate", "finish_row", "_likelier", "_highest"} <= seen, (
        "sees what is there"
    )


def test_the_innermost_function_of_ours_is_found():
    functions = {"a.py": [(1, 9, "clip")], "b.py": [(1, 5, "lane_max"), (6, 9, "add")]}
    assert _innermost("a.py:4:1 @[ b.py:7:2 @[ k.py:1:1 ] ]", functions) == "clip"
    assert _innermost("standard.py:170:27 @[ standard.py:191:40 @[ b.py:2:1 @[ b.py:7:1 ] ] ]", functions) == "add"
    assert _innermost("elsewhere.py:1:1", functions) == "elsewhere.py:1:1"


def test_a_spilling_configuration_fails_the_command():
    finished = run_without_interpreter(
        "-m", "popsd_kernels.aot", "--arch", "sm_90", "--kernel", "difference", "--config", "2048,4,1"
    )
    assert finished.returncode == 1
    assert re.search(r"FAIL: \d+ spill instructions", finished.stdout)


def test_code_is_written_and_described(tmp_path):
    """Two kernels by name on one GPU of each maker, in two calls: what is written is what the document names."""
    calls = {("sm_90", "row_statistics", "difference"): "ptx,sass", ("gfx942", "logit_difference_kernel"): "amdgcn"}
    small = "from popsd_kernels.aot import cases, command; import sys; shipped = cases.shipped_cases()\n"
    small += "command.shipped_cases = lambda: [c for c in shipped if c.flags in ('purified', 'log-sum-exp')]\n"
    small += "sys.exit(command.main(sys.argv[1:]))"
    for (architecture, *kernels), kinds in calls.items():
        names = [name.replace("logit_", "row_") for name in kernels]
        arguments = (
            "--kernel",
            *names,
            "--arch",
            architecture,
            "--emit",
            kinds,
            "--output-dir",
            str(tmp_path),
            "--json",
        )
        finished = run_without_interpreter("-c", small, *arguments)
        assert finished.returncode == 0, finished.stderr[-2000:]
        found = json.loads(finished.stdout)
        assert found["failures"] == 0 and len(found["cases"]) == len(kernels)
        for case in found["cases"]:
            paths = [Path(name) for name in case["files"]]
            assert [path.suffix for path in paths] == [f".{kind}" for kind in kinds.split(",")]
            assert all(case["kernel"] in path.read_text() for path in paths) and case["registers"] > 0
    assert len(list(tmp_path.rglob("*.*"))) == 5


def test_no_two_cases_share_a_file(tmp_path):
    rows = [
        {"architecture": "sm_90", "kernel": x.kernel, "flags": x.flags}
        for x in (*cases.all_cases(), *cases.shipped_cases())
    ]
    assert len({command._written("", "ptx", row, tmp_path).lower() for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TRITON_INTERPRET is set: .* unset it"),
        (["--kernel", "stats"], "--kernel.*invalid choice: 'stats' .*'statistics'"),
        (["--arch", "sm_70"], "--arch.*invalid choice: 'sm_70' .*'sm_80'"),
        (["--emit", "ptx,elf"], "--emit: expected some of .*sass.*; got 'elf'"),
        (["--emit", "ptx", "--arch", "sm_90", "gfx942"], "--emit: expected some of .*amdgcn.* for gfx942; got ptx"),
        (["--emit", "ptx,amdgcn"], "--emit: expected kinds of one maker's GPUs; got ptx, amdgcn"),
        (["--output_dir", "code"], "--output_dir: expected --emit beside it.*; got none"),
        (["--config", "2048,4"], "--config: expected three numbers such as 2048,4,8; got '2048,4'"),
        (["--config", "2000,4,8"], "--config: expected three numbers .*powers of two"),
        (["--config", "2048,4,3"], "--config: expected a power of two for WARPS; got 3"),
        (["--config", "2048,4,8"], "--config: expected row kernels.*; got stream_statistics"),
        (["--all", "--kernel", "masks"], "--all: has no case of masks"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_every_flag_has_help():
    assert all(action.help for action in command.parser()._actions)


def test_limits_are_checked():
    device = report.DEVICES["sm_120"]
    good = report.Report(64, 0, 32, 256, (), False)
    assert report.problems(good, device) == []
    for change in ({"spills": 1}, {"shared": 101_377}, {"threads": 2048}, {"registers": 255, "threads": 512}):
        assert report.problems(report.Report(**{**good.__dict__, **change}), device)


@pytest.mark.parametrize(("memory", "spills"), [(0, 0), (16, 4)])
def test_scalar_registers_in_lanes_of_a_vector_register_are_no_spills_to_memory(memory, spills):
    """gfx942, relative JSD: 18 scalar registers moved by v_writelane, and no byte of private memory."""
    counts = {"vgpr_count": 102, "vgpr_spill_count": 0, "sgpr_spill_count": 4, "private_segment_fixed_size": memory}
    assembly = "\n".join(f"    .{name}: {number}" for name, number in counts.items())
    assert report._inspect_gcn(assembly) == (102, spills, (), False)


def test_every_table_entry_has_a_device_and_every_flag_a_case():
    assert set(launch.TABLES) == set(report.DEVICES)
    rows = {case.kernel for case in cases.shipped_cases() if not case.kernel.startswith("stream_")}
    assert rows == set(launch.TABLES["sm_90"]) - {"loss_gradient_entry_clip"}
    assert set(plan.TABLES) == set(report.DEVICES)
    tiles = {case.table for case in cases.shipped_cases() if isinstance(case, StreamCase)}
    assert tiles == {name for name, _ in plan.TABLES["sm_90"]}
    assert sum(1 for _ in cases.all_cases()) == 12 * (3 + 3 + 2) + 144
