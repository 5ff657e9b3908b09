"""``axolotl train`` with popsd's plugin, on a CPU, in an environment that has Axolotl: docs/unsloth_axolotl.md."""

import pytest

pytest.importorskip("axolotl", reason="Axolotl is not installed")

import torch
import yaml
from axolotl.cli.train import do_cli
from byte_models import oracle_loss, save
from framework_helpers import BETA, ROWS, FixedTrainer, Gradients, flat, in_contexts
from transformers import AutoModelForCausalLM

import popsd
from popsd.testing import relative_l2
from popsd_integrations.axolotl_plugin import plugin

pytestmark = pytest.mark.slow
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True}
NO_GPU = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "bf16": False, "fp16": False}
STEPS = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "num_epochs": 1, "logging_steps": 1}
OPTIMIZER = {"optimizer": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler": "constant", "max_grad_norm": 1e9}
POPSD = {"beta": BETA, "max_completion_length": 6, "plot_metrics": False, "shuffle_dataset": False}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the command line's function on a YAML; returns the path of the model, the trainer and its gradients."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    path, data = save(tmp_path, ROWS)
    made = []

    class Watched(plugin.AxolotlTrainer):
        _generate_single_turn = FixedTrainer._generate_single_turn

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made[:] = [self, gradients]
            self.add_callback(gradients)
            self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    gradients = Gradients()
    monkeypatch.setattr(plugin, "AxolotlTrainer", Watched)

    def run(**options):
        given = {"base_model": path, "plugins": ["popsd_integrations.axolotl_plugin.plugin.PopsdPlugin"]}
        given |= {"datasets": [{"path": data, "ds_type": "json", "split": "train"}], "sequence_len": 256}
        given |= {"output_dir": str(tmp_path / "run"), "save_strategy": "no", "popsd": POPSD}
        written = tmp_path / "run.yaml"
        written.write_text(yaml.safe_dump(given | NO_GPU | STEPS | OPTIMIZER | options), encoding="utf-8")
        do_cli(str(written))
        return path, made[0], made[1].steps

    return run


@pytest.mark.parametrize("adapter", [LORA, {}], ids=["lora", "full"])
def test_loss_and_gradient_of_a_step_are_the_oracles(train, tmp_path, adapter):
    path, trainer, gradients = train(**adapter)
    frozen = AutoModelForCausalLM.from_pretrained(path).eval()
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(trainer.before[name])
    student.zero_grad()
    loss = oracle_loss(student, frozen, in_contexts(), popsd.PurifiedConfig(beta=BETA))
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == len(gradients) == 2 and logged[0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert expected.keys() == gradients[0].keys()
    assert relative_l2(flat(gradients[0]), flat(expected)) < 1e-4
    saved = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert (tmp_path / "run" / saved).exists() and (tmp_path / "run" / "popsd_run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_packing": True}, "sample_packing: expected none"),
        ({"popsd": POPSD | {"learning_rate": 1.0}}, r"popsd: .*got \['learning_rate'\]"),
    ],
)
def test_what_would_be_ignored_is_refused(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(**LORA, **options)
