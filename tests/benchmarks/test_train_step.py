"""The step benchmark measures every part of the trainer's step, and towards which target it trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SMALL = ["--prompt", "5", "--completion", "7", "--micro-batch", "2", "--rounds", "2", "--rank", "2"]


@pytest.mark.slow
def test_every_part_of_every_variant_is_measured(tmp_path):
    command = [sys.executable, str(SCRIPT), *SMALL, "--checkpointing", "--json", str(tmp_path / "step.json")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ)
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    assert list(result["variants"]) == ["purified", "opsd"]
    for name, variant in result["variants"].items():
        assert len(variant["rounds"]) == 2 and variant["peak_gib"] > 0.05
        assert set(variant["median"]) == {"frozen", "student", "loss", "backward", "optimiser"}
        assert all(seconds > 0 for seconds in variant["median"].values()), name
        totals = [sum(parts.values()) for parts in variant["rounds"]]
        assert min(totals) == variant["fastest"] <= variant["step"] <= max(totals)
    losses = [variant["loss"] for variant in result["variants"].values()]
    assert min(losses) > 1e-4 and losses[0] != pytest.approx(losses[1], rel=1e-2)
    assert result["ratios"]["step"] > 0 and "purified / opsd: " in found.stdout
