"""popsd on Unsloth's models, on a CPU, in an environment that has Unsloth: docs/unsloth_axolotl.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("unsloth", reason="Unsloth is not installed")  # before transformers, as it demands

import torch
from byte_models import oracle_loss, save
from framework_helpers import BETA, flat, in_contexts, train
from transformers import AutoModelForCausalLM
from unsloth import FastLanguageModel

import popsd
from popsd.testing import relative_l2

pytestmark = pytest.mark.slow
CONFIG = popsd.PurifiedConfig(beta=BETA)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(tmp_path_factory.mktemp("unsloth"), [])[0]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_unsloths_model_for_cpus_takes_the_oracles_step(tmp_path, path, lora):
    options = {"max_seq_length": 256, "load_in_4bit": False, "dtype": torch.float32, "full_finetuning": not lora}
    model, _ = FastLanguageModel.from_pretrained(path, **options)
    if lora:
        model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, lora_dropout=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer, gradients = train(tmp_path, model)
    student, frozen = trainer.model.eval(), AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(before[name])
    student.zero_grad()
    loss = oracle_loss(student, frozen, in_contexts(), CONFIG)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert expected.keys() == gradients[0].keys() and len(gradients) == 2
    assert relative_l2(flat(gradients[0]), flat(expected)) < 1e-4


def test_what_its_code_for_gpus_puts_in_place(tmp_path, path):
    """The trainer that Unsloth writes from TRL's trains the same. Its forwards keep the padding mask when popsd calls them."""
    here = Path(__file__).parent
    search = os.pathsep.join([*filter(None, sys.path), str(here.parents[1])])
    line = [sys.executable, str(here / "gpu_code.py"), path, str(tmp_path)]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": search}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trainer"] == "UnslothDistillationTrainer" and found["forward"] == "LlamaModel_fast_forward"
    frozen = AutoModelForCausalLM.from_pretrained(path).eval()
    expected = oracle_loss(frozen, frozen, in_contexts(), CONFIG).item()
    assert len(found["losses"]) == 2 and found["losses"][0] == pytest.approx(expected, rel=1e-4)
    assert found["error"] < 1e-5 and found["side"] == "left"
    assert found["error_of_its_own"] > 0.1, "Unsloth keeps the mask by itself now: take the flag out of heads.py"
