"""The promise of the library in one number: peak memory stays under the workspace, far from one [N, V] tensor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "cpu_torch.py"
N, V, D, WORKSPACE_MIB = 2048, 32768, 64, 16
ONE_LOGIT_BUFFER_MIB = 4 * N * V / 2**20  # 256


@pytest.mark.parametrize("loss", ["popsd", "popsd two"])
def test_peak_stays_within_the_workspace(loss):
    shape = ["--n", N, "--vocab", V, "--width", D, "--workspace-mib", WORKSPACE_MIB]
    command = [sys.executable, BENCHMARK, "--memory", loss, *shape]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    # one sweep's temporaries and the packing buffers of the matrix products come on top: 6 MiB here
    assert measured["peak_extra"] < WORKSPACE_MIB + measured["dh"] + 24, measured
    assert measured["peak_extra"] < ONE_LOGIT_BUFFER_MIB / 4
    assert measured["peak_extra"] > WORKSPACE_MIB / 4, "so little that the measurement itself must be broken"
