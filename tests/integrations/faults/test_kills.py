"""Runs that are killed, and processes that die beside others.

POPSD_KILLS: how many kills of each kind the slow test tries, 100 unless it is set.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("trl")

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), ENVIRONMENT.get("PYTHONPATH", "")])


@pytest.mark.parametrize(
    ("kinds", "kills"),
    [
        pytest.param("loop,trainer", 1, id="both"),  # at a file operation, whatever the machine's load
        *(
            pytest.param(kind, int(os.environ.get("POPSD_KILLS", 100)), marks=pytest.mark.slow)
            for kind in ("loop", "trainer")
        ),
    ],
)
def test_killed_runs_resume_to_the_same_weights(tmp_path, kinds, kills):
    command = [sys.executable, str(HERE / "forked_runs.py"), kinds, str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60 + 60 * kills)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == kinds.split(",")
    for kind, counts in found.items():
        assert counts["identical"] == counts["kills"] == kills, (kind, counts["wrong"])
        assert counts["resumable"] > 0
        assert kills < 100 or counts["unfinished"] > 0, "no kill came while a file was written"


DYING = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from trl_helpers import FixedTrainer, build

class Dying(FixedTrainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_loss(*args, **kwargs)

trainer = build(sys.argv[1], cls=Dying, lora=True, max_steps=50, per_device_train_batch_size=2, ddp_timeout=20)
print("built", flush=True)
trainer.train()
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    """Without torchrun, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=open(tmp_path / f"{rank}.log", "w"),  # noqa: SIM115
        )
        for rank in (0, 1)
    ]
    try:
        assert ranks[1].wait(timeout=300) == -signal.SIGKILL, (tmp_path / "1.log").read_text()[-3000:]
        began = time.monotonic()
        assert ranks[0].wait(timeout=60) not in (0, None)
        assert time.monotonic() - began < 40
        assert "DistBackendError" in (tmp_path / "0.log").read_text() or "gloo" in (tmp_path / "0.log").read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
