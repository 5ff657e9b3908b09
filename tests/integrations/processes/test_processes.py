"""Two gloo processes against one: losses and gradients in every wrapper, the plain loop, and the examples' loops.

One process imports everything and forks the ranks of each check (``forked_ranks.py``); the tests look at what they found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import loop_helpers
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

HERE = Path(__file__).parent
NEAR = 1e-6
"""Of parameters after two or three steps of 1e-3. Adam divides a gradient by its own size, so an entry whose gradient is of
the size of its rounding, 1e-8, is off by a share of the step."""


def checked(folder, *modules):
    """What the ranks of each check of these modules found."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "forked_ranks.py"), str(folder), *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder):
    return checked(folder, "wrapper_checks", "loop_checks")


@pytest.fixture(scope="module")
def examples(folder):
    return checked(folder, "example_checks")


def found(results, check):
    """What both ranks found, which is the same."""
    first, second = results[check]
    assert first["code"] == second["code"] == 0, first["found"]
    assert first == second
    return first["found"]


def test_gradients_of_wrapped_models_are_those_of_one_process(results):
    cases = found(results, "wrappers")
    assert len(cases) == 10
    for case, (error, loss_error, largest) in cases.items():
        assert error < 1e-6 < 1e-2 < largest, case
        assert loss_error < 1e-6, case


def test_a_call_past_the_wrapper_is_refused(results):
    told = found(results, "refusals")
    for case, name in (("ddp, module", "DistributedDataParallel"), ("ddp, base", "DistributedDataParallel")):
        assert told[case].startswith(f"model: expected the {name} around it, which reduces the gradients; got the ")
    assert told["fsdp2, base"].startswith("model: expected the FSDPPeftModelForCausalLM around it")
    for case in ("fsdp1", "fsdp1, head", "fsdp1, frozen"):
        assert "FullyShardedDataParallel (FSDP1)" in told[case] and "run_in_forward(model, function)" in told[case]
    for case in ("ddp", "ddp, inside", "ddp, no gradient", "bare, inside"):
        assert told[case] == "nothing", case


def test_one_process_decides_for_all_and_counts_are_global(results):
    told = found(results, "refusals")
    assert told["agreed"] == ["of rank 0", "'of rank 0'"]
    assert told["items"] == (0.5 + 0.5 + 2 + 1) / 2


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_plain_loop_on_two_processes_is_that_on_one(results, folder, tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(HERE)
    import loop_checks

    expected, metrics = loop_checks.trained(kind, tmp_path), found(results, "trained_together")[kind]
    assert len(metrics) == len(expected) == 3 and [row for row in metrics if "eval/accuracy" in row] == metrics[1:]
    for row, other in zip(metrics, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
        assert row["loss"] > 0.005 and row["grad_norm"] > 0.01
    two = folder / "trained_together" / kind
    assert loop_helpers.deterministic(map(json.loads, (two / "metrics.jsonl").read_text().splitlines())) == metrics
    alone, *ranks = (torch.load(x) for x in (tmp_path / "parameters-alone.pt", *sorted(two.glob("parameters-[01].pt"))))
    for name, parameter in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], parameter, rtol=0, atol=NEAR)
    judged = [(place / "eval_completions.jsonl").read_text().splitlines() for place in (two, tmp_path)]
    assert judged[0] == judged[1] and len(judged[0]) == 2 * 2 * len(loop_checks.HELD_OUT.answers)


@pytest.mark.parametrize("how", ["the_kill", "the_end"])
def test_a_run_of_two_processes_resumes_to_the_same_bits(results, how):
    assert found(results, f"resumed_after_{how}") == found(results, "unbroken")
    first, second = results["asked_to_end"]
    assert first["code"] == second["code"] == 143, "both end where one was asked to"


def test_a_process_that_dies_or_hangs_ends_the_others(results):
    survivor, dead = results["killed"]
    assert (survivor["code"], dead["code"]) == (1, -9) and "Connection" in survivor["found"]
    survivor, _ = results["silent"]
    assert survivor["code"] == 1 and "Timed out waiting 5000ms" in survivor["found"]


def test_rows_that_are_not_finite_are_named_wherever_they_are(results):
    named = found(results, "poisoned")
    expected = {i for i, prompt in enumerate(loop_helpers.PROMPTS) if any(4 in context for context in prompt)}
    assert {i for i in range(10) if f"prompts[{i}]" in named} == expected and "3 steps in a row" in named


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("uneven", "batch_size: expected a multiple of the 2 processes, which share it; got 3"),
        ("seeds", "process 1 differs from process 0 in seed. Build model, data and options alike"),
        ("weights", "process 1 differs from process 0 in initial weights"),
        ("wrapped", "model: expected the whole model, unwrapped, on each process; got DistributedDataParallel"),
        ("places", "process 0 finds a checkpoint of step 0 there, process 1 of step 3"),
        ("held", "output_dir: expected a folder that no other run writes to"),
        ("folder", "output_dir: expected a folder that can be written to"),
        ("processes", "got one that differs in processes"),
    ],
)
def test_what_the_processes_cannot_share_is_refused_before_any_work(results, case, message):
    assert message in found(results, "refused")[case]


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["plain", "torchrun", "accelerate"])
def test_the_examples_on_two_processes_are_those_on_one(examples, folder, loop):
    two, one = found(examples, f"{loop}_example"), examples[f"{loop}_example_alone"][0]["found"]
    assert len(two) == len(one) == 2
    for row, other in zip(two, one, strict=True):
        assert row == pytest.approx(other, abs=1e-6) and row["loss"] > 0.005
    from safetensors.torch import load_file

    names = [next(folder.glob(f"{loop}_example{end}/run/**/adapter_model.safetensors")) for end in ("", "_alone")]
    weights = [load_file(name) for name in names]
    assert weights[0].keys() == weights[1].keys()
    assert max(x.abs().max() for name, x in weights[0].items() if "lora_B" in name) > 1e-3, "they begin at 0"
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=NEAR)
