"""The step benchmark measures what it says, and needs neither trl nor datasets for it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
BLOCKED = """
import runpy, sys
sys.modules |= dict.fromkeys(("trl", "datasets"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = ["--prompt", "5", "--completion", "7", "--micro-batch", "2", "--rounds", "2", "--rank", "2"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_every_part_of_every_variant_is_measured(tmp_path):
    found = run(*SMALL, "--checkpointing", "--json", tmp_path / "step.json")
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    assert list(result["variants"]) == ["purified", "opsd", "opsd eager"]
    for name, variant in result["variants"].items():
        assert len(variant["rounds"]) == 2 and variant["peak_gib"] > 0.05
        assert all(seconds > 0 for seconds in variant["median"].values()), name
        parts = [sum(x.values()) for x in variant["rounds"]]
        assert min(parts) <= variant["median"]["step"] <= max(parts)
    losses = {name: variant["loss"] for name, variant in result["variants"].items()}
    assert losses["opsd"] == pytest.approx(losses["opsd eager"], rel=1e-4) and losses["opsd"] > 1e-4
    assert losses["purified"] != pytest.approx(losses["opsd"], rel=1e-2)
    assert set(result["ratios"]) == {"purified / opsd", "opsd eager / opsd"}
    assert "opsd eager / opsd: " in found.stdout


def test_the_search_for_memory_wants_a_gpu():
    found = run("--largest-micro-batch")
    assert found.returncode == 2 and "--largest-micro-batch: expected --device cuda; got cpu" in found.stderr


@pytest.mark.parametrize(("most", "expected"), [(256, 11), (8, 8)])
def test_the_search_finds_the_largest_that_fits(monkeypatch, most, expected):
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.parse_options([*SMALL, "--most-rows", str(most)])
    step = module.Step(options, 1)
    real, tried = step.run, []

    def run(variant):
        tried.append(step.rows)
        if step.rows > 11:
            raise torch.OutOfMemoryError("no memory")
        return real(variant)

    step.run = run
    assert module.largest_micro_batch(step, "opsd") == expected
    assert max(tried) == (16 if most == 256 else 8)
