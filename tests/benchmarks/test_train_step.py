"""The step benchmark measures every part of the trainer's step, and towards which target it trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from popsd_benchmarks.results import load

pytest.importorskip("peft")
pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SMALL = ["--prompt", "5", "--micro-batch", "2", "--rounds", "2", "--rank", "2"]


@pytest.mark.slow
def test_every_part_of_every_variant_is_measured(tmp_path):
    command = [sys.executable, str(SCRIPT), *SMALL, "--checkpointing", "--json", str(tmp_path / "step.json")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ)
    assert found.returncode == 0, found.stderr
    results = load(tmp_path / "step.json")
    rows = {row["name"]: row for row in results.records}
    assert list(rows) == ["purified", "opsd"] and results.meta["options"]["prompt"] == 5
    for row in rows.values():
        assert row["status"] == "ok" and row["peak_gib"] > 0.05
        parts = [row[f"{part}_s"] for part in ("frozen", "student", "loss", "backward", "optimiser")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(row["step_s"], rel=0.5)
        assert 0 < row["fastest_s"] <= row["step_s"] and 0 < row["loss_share"] < 1
    losses = [row["loss"] for row in rows.values()]
    assert min(losses) > 1e-4 and losses[0] != pytest.approx(losses[1], rel=1e-2)
    assert rows["purified"]["over_opsd"] > 0 and "over_opsd" in found.stdout
