"""Two gloo processes give the figures of one on the same global batch: loss, gradient norm, metrics, parameters.

full: a copy of the initial weights; apart: the head untied and sharded by itself; teacher: the frozen weights sharded too;
path: loaded from files, which ZeRO-3 partitions as it loads; masked: with token masks, under which a trained head is needed
again in backward; several: four completions of each prompt, packed; accumulated, checkpointed: on the two processes alone;
evaluated: between the steps, on seven rows, of which the last batch of two processes repeats one; vllm: sampled greedily by
what is sent to a model in place of vLLM on each process, which two processes must send as one does.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

HERE = Path(__file__).parent
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
NOT_COMPARED = ("step_time", "runtime", "per_second", "padding_share", "epoch")


def launch(engine, kind, folder):
    folder.mkdir(parents=True)
    command = [sys.executable]
    if engine != "one":
        command += ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # With ACCELERATE_USE_CPU accelerate silently leaves DeepSpeed out.
    environment["DS_ACCELERATOR" if "zero" in engine else "ACCELERATE_USE_CPU"] = "cpu" if "zero" in engine else "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*command, str(HERE / "distributed_run.py"), engine, kind, str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    known = {}

    def result(kind):
        if kind not in known:
            known[kind] = launch("one", kind, tmp_path_factory.mktemp("one") / kind)
        return known[kind]

    return result


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("ddp", "full-evaluated"),
        pytest.param("ddp", "lora", marks=pytest.mark.slow),
        pytest.param("ddp", "lora-several", marks=pytest.mark.slow),
        pytest.param("ddp", "lora-vllm", marks=pytest.mark.slow),
        pytest.param("fsdp2", "full", marks=pytest.mark.slow),
        pytest.param("fsdp2", "lora-vllm", marks=pytest.mark.slow),
        pytest.param("fsdp2", "full-vllm", marks=pytest.mark.slow),
        pytest.param("fsdp2", "lora", marks=pytest.mark.slow),
        pytest.param("fsdp2", "full-apart", marks=pytest.mark.slow),
        pytest.param("fsdp2", "lora-apart", marks=pytest.mark.slow),
        pytest.param("fsdp2", "full-apart-teacher", marks=pytest.mark.slow),
        *(
            pytest.param(engine, kind, marks=[pytest.mark.slow, NEEDS_DEEPSPEED])
            for engine, kind in (
                ("zero2", "full"),
                ("zero2", "lora"),
                ("zero3", "full-path"),
                ("zero3", "lora-vllm"),
                ("zero3", "full-vllm"),
                ("zero3", "full-apart-masked-accumulated"),
                ("zero3", "lora-evaluated"),
                ("zero3", "lora-apart-checkpointed-accumulated"),
            )
        ),
    ],
)
def test_two_processes_are_one(engine, kind, one_process, tmp_path):
    expected, found = one_process(kind), launch(engine, kind, tmp_path / "two")
    assert len(found["logs"]) == len(expected["logs"]) == 3
    assert len(found["eval"]) == len(expected["eval"]) == (3 if "evaluated" in kind else 0)
    for row, other in zip(*(x["logs"] + x["eval"] for x in (expected, found)), strict=True):
        row, other = ({n: x for n, x in r.items() if not any(word in n for word in NOT_COMPARED)} for r in (row, other))
        assert other == pytest.approx(row, rel=1e-5, abs=1e-6)
    if "several" in kind:
        assert {(row["prompts/distinct"], row["prompts/length_std"]) for row in found["logs"]} == {(0.25, 0)}
    assert found["judged"] == expected["judged"] and len(found["judged"]) == len(found["eval"]) * 7 * 2
    assert all(row["eval_accuracy"] == row["eval_accuracy_greedy"] == 3 / 7 for row in found["eval"])
    assert found["held"] == pytest.approx(expected["held"], rel=1e-5) and bool(found["held"]) == ("vllm" in kind)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert expected["logs"][0]["loss"] > 0.005 and expected["logs"][0]["grad_norm"] > 0.01
