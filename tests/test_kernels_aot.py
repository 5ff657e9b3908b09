"""Every shipped kernel compiles for every listed GPU, within its limits; the report is what a user would see."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_helpers import run_without_interpreter

from popsd_kernels import aot, launch, streaming_plan
from popsd_kernels.streaming_aot import StreamCase

# SASS instructions per vocabulary entry over both sweeps, telemetry included (sm_90, Triton 3.7.1: 39.7, 48.7, 58.5).
BUDGET = {"forward KL": 40.0, "reverse KL": 49.0, "JSD": 59.0}


def _instructions(report: str, kernel: str, flags: str) -> float:
    line = next(x for x in report.splitlines() if re.search(rf"{kernel}\s+{re.escape(flags)}\s+regs", x))
    found = re.search(r"instructions/entry ([\d.]+(?: \+ [\d.]+)*)", line)
    assert found is not None, line
    return sum(map(float, found[1].split(" + ")))


@pytest.fixture(scope="module")
def reports():
    """Per architecture the finished command: as many at a time as there are processors, for each takes most of a minute."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        names = sorted(aot.DEVICES)
        found = pool.map(lambda name: run_without_interpreter("-m", "popsd_kernels.aot", "--arch", name), names)
        return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("architecture", sorted(aot.DEVICES))
def test_shipped_kernels_compile_without_spills(architecture, reports):
    finished = reports[architecture]
    assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
    assert finished.stdout.count(f"{architecture} ") == len(aot.shipped_cases())
    for line in finished.stdout.splitlines():
        if line.startswith(f"{architecture} "):
            # exact float32 products run on the ordinary units of NVIDIA; gfx942 has float32 matrix units
            product = " stream_" in line and ("float32" not in line or architecture == "gfx942")
            assert f"matrix units {'yes' if product else 'no'}" in line, line
    if architecture == "sm_90":
        first = _instructions(finished.stdout, "statistics", "purified")
        for mode, budget in BUDGET.items():
            total = first + _instructions(finished.stdout, "loss_gradient", mode)
            assert 20 < total <= budget, f"{mode}: {total} instructions per entry"


def test_a_spilling_configuration_fails_the_command():
    finished = run_without_interpreter(
        "-m", "popsd_kernels.aot", "--arch", "sm_90", "--kernel", "difference", "--config", "4096,4,1"
    )
    assert finished.returncode == 1
    assert re.search(r"FAIL: \d+ spill instructions", finished.stdout)


def test_the_interpreter_is_refused(monkeypatch):
    with pytest.raises(SystemExit):
        aot.main([])


def test_limits_are_checked():
    device = aot.DEVICES["sm_120"]
    good = aot.Report(64, 0, 32, 256, (), False)
    assert aot.problems(good, device) == []
    for change in ({"spills": 1}, {"shared": 101_377}, {"threads": 2048}, {"registers": 255, "threads": 512}):
        assert aot.problems(aot.Report(**{**good.__dict__, **change}), device)


def test_every_table_entry_has_a_device_and_every_flag_a_case():
    assert set(launch.TABLES) == set(aot.DEVICES)
    rows = {case.kernel for case in aot.shipped_cases() if not case.kernel.startswith("stream_")}
    assert rows == set(launch.TABLES["sm_90"]) - {"loss_gradient_entry_clip"}
    assert set(streaming_plan.TABLES) == set(aot.DEVICES)
    tiles = {case.table for case in aot.shipped_cases() if isinstance(case, StreamCase)}
    assert tiles == {name for name, _ in streaming_plan.TABLES["sm_90"]}
    assert sum(1 for _ in aot.all_cases()) == 12 * (3 + 3 + 2) + 144
