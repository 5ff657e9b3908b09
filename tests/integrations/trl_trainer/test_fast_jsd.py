"""``patch_trl``: TRL's trainers with popsd's loss are TRL's trainers."""

import doctest
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.distillation_trainer as distillation
from gkd_helpers import GKDTrainer, collate, gkd
from gkd_helpers import distillation as distil
from transformers import TrainerCallback
from trl import DistillationTrainer
from trl_helpers import LORA, completion_of, tiny, trl_loss

import popsd_integrations
from popsd.testing import relative_l2
from popsd_integrations.trl_trainer import fast_jsd


@pytest.fixture
def patched():
    popsd_integrations.patch_trl()
    yield
    popsd_integrations.unpatch_trl()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("counted", [True, False])
def test_the_fast_loss_is_trls(beta, counted):
    """Loss, gradients, entropy and count of TRL's own function, with every transform it knows, in float32."""
    torch.manual_seed(0)
    batch, tokens, width, vocab = 3, 5, 16, 67
    student = torch.randn(batch, tokens, width)
    teacher = student + torch.randn(batch, tokens, width)
    weight, frozen = torch.randn(vocab, width), torch.randn(vocab, width)
    mask = (torch.arange(tokens) < torch.tensor([[5], [2], [0]])).int()
    options = {
        "num_items_in_batch": torch.tensor(11) if counted else None,
        "student_lm_head_bias": torch.randn(vocab),
        "teacher_lm_head_bias": torch.randn(vocab),
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 0.25,
        "student_final_logit_softcapping": 5.0,
        "teacher_final_logit_softcapping": 4.0,
        "temperature": 1.3,
    }
    results = []
    for function in (trl_loss, fast_jsd.chunked_divergence_loss):
        inputs = [x.clone().requires_grad_() for x in (student, weight)]
        loss, entropy, count = function(inputs[0], teacher, inputs[1], frozen, mask, beta, **options)
        loss.backward()
        results.append((loss.detach(), entropy.detach(), count, *(x.grad for x in inputs)))
    theirs, ours = results
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
    assert ours[1].item() == pytest.approx(theirs[1].item(), rel=1e-5)
    assert ours[2] == theirs[2] == 7
    for found, expected in zip(ours[3:], theirs[3:], strict=True):
        assert relative_l2(found, expected) < 1e-5


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def outcome(build):
    """What a run with TRL's own loss and one with popsd's logged, their gradients, and their evaluations."""
    results = []
    for change in (popsd_integrations.unpatch_trl, popsd_integrations.patch_trl):
        change()
        try:
            gradients = Gradients()
            trainer = build(gradients)
            trainer.train()
        finally:
            popsd_integrations.unpatch_trl()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        results.append((losses, gradients.steps, trainer))
    return results


GKD = {
    "JSD": {},
    "LoRA, on-policy": {"peft_config": LORA, "lmbda": 1.0, "max_new_tokens": 4, "temperature": 0.5},
    "forward KL": {"beta": 0.0},
    "reverse KL": {"beta": 1.0},
    "one micro-batch": {"gradient_accumulation_steps": 1, "average_tokens_across_devices": False},
}


@pytest.mark.parametrize("case", [x if x == "JSD" else pytest.param(x, marks=pytest.mark.slow) for x in GKD])
def test_gkd_takes_trls_own_steps(tmp_path, case):
    """Two optimiser steps with accumulation: losses and gradients, divided by the tokens that TRL divides by."""
    theirs, ours = outcome(lambda gradients: gkd(tmp_path, callbacks=[gradients], **GKD[case]))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and min(ours[0]) > 1e-3
    assert len(ours[1]) == len(theirs[1]) == 2
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert relative_l2(found, expected) < 1e-5
        assert expected.norm() > 1e-3


def test_gkd_evaluates_as_trl_does(tmp_path):
    expected = gkd(tmp_path).evaluate()["eval_loss"]
    popsd_integrations.patch_trl()
    try:
        trainer = gkd(tmp_path)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5) and expected > 1e-3
        with pytest.raises(ValueError, match="prediction_loss_only: expected True after patch_trl"):
            trainer.predict(trainer.eval_dataset)
    finally:
        popsd_integrations.unpatch_trl()


def test_gkd_reads_soft_caps_and_the_mask_of_a_row_without_completions(tmp_path):
    """One batch by hand, of a model with logits between ±2, and of nothing but prompts."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    gemma = Gemma2Config(
        vocab_size=40, num_key_value_heads=2, final_logit_softcapping=2.0, initializer_range=0.5, **sizes
    )
    student, teacher = (AutoModelForCausalLM.from_config(gemma) for _ in range(2))
    trainer = gkd(tmp_path, student=student, teacher=teacher, disable_dropout=True)
    for lengths, items in (((4, 0), None), ((0, 0), None), ((2, 3), 9), ((2, 3), torch.tensor(9))):
        batch = collate([{"a": 1, "length": length} for length in lengths])
        found = []
        for loss in (GKDTrainer.compute_loss, fast_jsd._gkd_loss):
            trainer.model.zero_grad()
            value = loss(trainer, trainer.model, batch, num_items_in_batch=items)
            value.backward()
            grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            found.append((value.item(), torch.cat(grads) if grads else torch.zeros(1)))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-9)
        if any(lengths):
            assert relative_l2(found[1][1], found[0][1]) < 1e-5 and found[0][0] > 1e-2


def test_distillation_takes_trls_own_steps(tmp_path):
    trl_loss(*torch.ones(2, 1, 1, 2), *torch.ones(2, 3, 2), torch.ones(1, 1), 0.5)  # skips where it does not run

    def build(gradients):
        options = {"max_steps": 2, "temperature": 0.8, "callbacks": [gradients]}
        return distil(tmp_path, tiny(), tiny(seed=3), lambda _, prompts: list(map(completion_of, prompts)), **options)

    theirs, ours = outcome(build)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and theirs[0][0] > 0.01
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert relative_l2(found, expected) < 1e-5
    entropies = [[row["entropy"] for row in run[2].state.log_history if "entropy" in row] for run in (theirs, ours)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)


def members():
    names = ("__init__", "compute_loss", "prediction_step")
    return {name: vars(GKDTrainer).get(name) for name in names} | {
        "loss": distillation._chunked_divergence_loss,
        "distillation": vars(DistillationTrainer)["__init__"],
    }


def test_the_patch_is_one_and_is_undone():
    before, signature = members(), inspect.signature(GKDTrainer)
    found = doctest.testmod(popsd_integrations)
    assert found.attempted == 4 and found.failed == 0 and members() == before
    popsd_integrations.unpatch_trl()
    assert members() == before
    path = Path(__file__).parents[3] / "examples" / "fast_jsd_for_trl.py"
    spec = importlib.util.spec_from_file_location("fast_jsd_for_trl", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    once = members()
    assert once["loss"] is fast_jsd.chunked_divergence_loss and once["compute_loss"] is fast_jsd._gkd_loss
    assert inspect.signature(GKDTrainer) == signature
    popsd_integrations.patch_trl()
    assert members() == once
    popsd_integrations.unpatch_trl()
    assert members() == before


class OwnLoss(GKDTrainer):
    @staticmethod
    def generalized_jsd_loss(*args, **kwargs):
        raise AssertionError


REFUSED = {
    "label_smoothing_factor: expected none after patch_trl; got 0.1, which neither": {"label_smoothing_factor": 0.1},
    "compute_metrics: expected none after patch_trl; got .*, but the loss makes no logits": {"metrics": lambda x: {}},
    "loss_type: expected none after patch_trl; got 'dft', but the loss is the divergence": {"loss_type": "dft"},
    "generalized_jsd_loss: expected none after patch_trl; got 'one of OwnLoss', which": {"cls": OwnLoss},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_loss_would_not_read_is_refused_by_name(tmp_path, patched, message):
    with pytest.raises(ValueError, match=message):
        gkd(tmp_path, **REFUSED[message])


def test_sharded_gkd_is_refused_by_name(tmp_path):
    trainer = gkd(tmp_path)
    for name in ("fsdp", "deepspeed"):
        trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = name == "fsdp", name == "deepspeed"
        with pytest.raises(ValueError, match=f"{name}: expected none .* trl.DistillationTrainer takes it"):
            fast_jsd._check_gkd(trainer)


def test_distillation_refuses_label_smoothing(tmp_path, patched):
    with pytest.raises(ValueError, match="label_smoothing_factor: expected none after patch_trl"):
        distil(tmp_path, tiny(), tiny(seed=3), None, label_smoothing_factor=0.2)


def test_a_model_whose_logits_popsd_does_not_know_is_refused(tmp_path, patched):
    class Odd(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states).square()

    model = tiny(tied=False)
    model.lm_head = Odd(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    with pytest.raises(ValueError, match="expected the head read from Qwen3ForCausalLM to give the model's own logits"):
        gkd(tmp_path, teacher=model)


@pytest.mark.slow
def test_gkd_under_ddp_takes_trls_own_steps(tmp_path):
    """On two gloo processes, with accumulation."""
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(here / "gkd_ranks.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]
