"""A model that two processes hold by transformers' tensor-parallel plan trains as one process does, its head never gathered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_ranks_of_a_tensor_parallel_plan_train_as_one(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "tensor_parallel_ranks.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "Load the initial weights once more" in found.pop("refusal")
        assert len(found) > 30 and {"loss", "lm_head.weight", "metrics/student_entropy"} <= found.keys()
        assert max(found.values()) < 1e-5, found
