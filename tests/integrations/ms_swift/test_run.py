"""``swift rlhf --rlhf_type gkd`` with popsd's plugin, on a CPU, in an environment that has ms-swift: docs/ms_swift.md."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("swift.rlhf_trainers", reason="ms-swift is not installed")

import torch
from byte_models import byte_tokenizer, oracle_loss
from swift.rlhf_trainers import GKDTrainer
from swift_helpers import ROWS, Fixed, Moving, answer, command, files, plugin, run
from transformers import AutoModelForCausalLM

import popsd
from popsd.testing import relative_l2
from popsd_integrations.huggingface import ContextConfig

pytestmark = pytest.mark.slow
SOLUTION = {row["messages"][0]["content"]: row["solution"] for row in ROWS}
LORA = {"tuner_type": "lora", "lora_rank": "4", "lora_dropout": "0", "target_modules": "all-linear"}
FULL = {"tuner_type": "full"}
TRAINING = {
    "learning_rate": "1e-2",
    "lr_scheduler_type": "constant",
    "max_grad_norm": "1e9",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "max_steps": "2",
    "beta": "0.3",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return files(tmp_path_factory.mktemp("swift")) | TRAINING


def in_contexts(rows):
    """Rows as the oracle takes them, by prompts written here. Rows without a completion do not count."""
    tokenizer, written = byte_tokenizer(), ContextConfig()

    def turn(text):
        rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    return [
        (
            turn(question),
            turn(written.teacher_template.format(question=question, solution=SOLUTION[question])),
            turn(written.reference_template.format(solution=SOLUTION[question])),
            completion,
        )
        for question, completion in rows
        if completion
    ]


@pytest.mark.parametrize(
    ("tuner", "choice", "config"),
    [
        (LORA, "pmi_beta=2.0, diagnostics_steps=2", popsd.PurifiedConfig(beta=0.3, pmi_beta=2.0)),
        (FULL, "'opsd', loss_temperature=1.1", popsd.DivergenceConfig(beta=0.3, temperature=1.1)),
        (LORA, "'opsd', diagnostics_steps=0", popsd.DivergenceConfig(beta=0.3)),
        (FULL, "frozen_batch_size=1", popsd.PurifiedConfig(beta=0.3)),
    ],
    ids=["lora-purified", "full-opsd", "lora-opsd", "full-purified"],
)
def test_loss_and_gradient_of_two_steps_are_the_oracles(tmp_path, monkeypatch, given, tuner, choice, config):
    """On the second step the student is no longer the base, and under LoRA the adapter no longer zero."""
    evaluated = {"val_dataset": given["dataset"], "eval_strategy": "steps", "eval_steps": "2"}
    trainer = run(tmp_path, monkeypatch, given | tuner | evaluated, choice=choice)
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    frozen = AutoModelForCausalLM.from_pretrained(given["model"]).eval()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(trainer.rows) == len(logged) == 2 and all(len(rows) == 4 for rows in trainer.rows)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for step in range(2):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trainer.steps.before[step][name])
        student.zero_grad()
        loss = oracle_loss(student, frozen, in_contexts(trainer.rows[step]), config)
        loss.backward()
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged[step]["divergence"] == pytest.approx(loss.item(), rel=1e-4)
        found = trainer.steps.gradients[step]
        assert found.keys() == parameters.keys()
        expected = torch.cat([p.grad.flatten() for p in parameters.values()])
        assert relative_l2(torch.cat([found[name].flatten() for name in parameters]), expected) < 1e-4
    assert loss > 1e-3
    assert ("decomposition/reference_fraction" in logged[0]) == ("diagnostics_steps=0" not in choice)
    assert "decomposition/reference_fraction" not in logged[1]
    assert math.isfinite(next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row))
    for name, parameter in frozen.named_parameters():
        kept = trainer._frozen_source().constant()
        name = next(x for x in kept if x.replace("base_model.model.", "").replace(".base_layer", "") == name)
        assert torch.equal(kept[name], parameter), name


def test_the_split_into_micro_batches_does_not_matter(tmp_path, monkeypatch, given):
    """ms-swift's own loss is a mean of the micro-batches' means, for completions of one to four tokens another number."""
    found = []
    for rows, accumulated in ((8, 1), (4, 2), (1, 8)):
        split = {
            "per_device_train_batch_size": str(rows),
            "gradient_accumulation_steps": str(accumulated),
            "max_steps": "1",
        }
        trainer = run(tmp_path / str(rows), monkeypatch, given | FULL | split, Fixed)
        found.append(torch.cat([x.flatten() for x in trainer.steps.gradients[0].values()]))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        frozen = AutoModelForCausalLM.from_pretrained(given["model"]).eval()
        expected = oracle_loss(frozen, frozen, in_contexts(trainer.rows[0]), popsd.PurifiedConfig(beta=0.3))
        assert losses == [pytest.approx(expected.item(), rel=1e-4)]
    assert relative_l2(found[1], found[0]) < 1e-5 and relative_l2(found[2], found[0]) < 1e-5


@pytest.mark.parametrize("tuner", [LORA, FULL], ids=["lora", "full"])
def test_frozen_weights_that_move_stop_the_run(tmp_path, monkeypatch, given, tuner):
    with pytest.raises(RuntimeError, match="frozen weights: expected those of the start"):
        run(tmp_path, monkeypatch, given | tuner | {"max_steps": "1"}, Moving)


@pytest.mark.parametrize("tuner", [LORA, FULL], ids=["lora", "full"])
def test_a_resumed_run_takes_the_unbroken_ones_step(tmp_path, monkeypatch, given, tuner):
    saving = tuner | {"save_strategy": "steps", "save_steps": "1"}
    unbroken = run(tmp_path, monkeypatch, given | saving, Fixed)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    resumed = run(tmp_path / "2", monkeypatch, given | saving | {"resume_from_checkpoint": checkpoint}, Fixed)
    for name, gradient in unbroken.steps.gradients[1].items():
        assert torch.equal(resumed.steps.gradients[0][name], gradient), name
    began = Path(checkpoint) / "popsd_frozen.json"
    began.write_text(json.dumps({name: x + 1 for name, x in json.loads(began.read_text()).items()}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"model: expected the initial weights of the run in .*checkpoint-1; got others"
    ):
        run(tmp_path / "3", monkeypatch, given | saving | {"resume_from_checkpoint": checkpoint}, Fixed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model": None}, "teacher_model: expected the model once more; got none"),
        ({"lmbda": None}, "lmbda: expected 1; got 0.5"),
        ({"steps_per_generation": "3"}, "steps_per_generation: expected a multiple"),
        ({"sft_alpha": "0.5"}, "sft_alpha: expected 0"),
        ({"temperature": "0"}, "temperature: expected a positive number"),
    ],
)
def test_options_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, given, changes, message):
    changed = {name: x for name, x in (given | LORA | changes).items() if x is not None}
    changed["model"] = given["model"]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, monkeypatch, changed)


def test_columns_that_were_dropped_are_named(tmp_path, monkeypatch, given):
    with pytest.raises(ValueError, match=r"dataset: expected one of the columns .*--remove_unused_columns false"):
        run(tmp_path, monkeypatch, given | LORA | {"remove_unused_columns": "true"}, Fixed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "_prepare_batch_inputs": ["self", "samples"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "split_by_mini_batches": ["self", "samples"],
        "log": ["self", "logs", "start_time"],
    }.items(),
)
def test_methods_of_swift_have_the_signatures_relied_on(name, parameters):
    method = inspect.unwrap(getattr(GKDTrainer, name))
    assert list(inspect.signature(method).parameters) == parameters


def logged(given, **environment):
    """What ``swift rlhf`` logs of its steps, as a process of its own or as several."""
    line = [sys.executable, "-m", "swift.cli.main", "rlhf", *command(given)]
    search = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | search | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = (Path(given["output_dir"]) / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, rows) if "divergence" in row]


def test_two_processes_share_one_mean(tmp_path, given):
    """Loss and gradient norm of all rows, though the ranks' completions are of other lengths and their micro-batches too."""
    on_cpus = {"use_cpu": "true", "ddp_backend": "gloo", "max_steps": "1"}
    (row,) = logged(given | FULL | plugin(tmp_path, Fixed) | on_cpus, NPROC_PER_NODE="2")
    student, frozen = (AutoModelForCausalLM.from_pretrained(given["model"]).eval() for _ in range(2))
    answers = [(question, answer(question)) for question in SOLUTION]
    loss = oracle_loss(student, frozen, in_contexts(answers), popsd.PurifiedConfig(beta=0.3))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert (row["loss"], row["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=1e-4)


def test_the_command_of_the_documents(tmp_path, given):
    """As a process of its own, with the plugin whose path is printed, and with checkpoints."""
    printed = [sys.executable, "-m", "popsd_integrations.ms_swift"]
    path = subprocess.run(printed, capture_output=True, text=True, check=True).stdout.strip()
    own = {"external_plugins": path, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": "1"}
    assert len(logged(given | LORA | own)) == 2
    sums = (tmp_path / "checkpoint-2" / "popsd_frozen.json").read_text(encoding="utf-8")
    assert all(isinstance(value, int) for value in json.loads(sums).values())
