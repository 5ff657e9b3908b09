"""The contract with TRL's private names, and the pieces that stand on them."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.distillation_trainer as trl_module
from trl import DistillationTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict
from trl_helpers import ROWS, FixedTrainer, build, tiny, trl_loss

from popsd.testing import relative_l2
from popsd_integrations.huggingface.packing import unpad
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.trl_trainer import compat, fast_jsd
from popsd_integrations.trl_trainer.guards import GuardedTrainer
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer, problem_of


@pytest.mark.parametrize("version", ["1.12.0", "1.12.1", "1.16.0", "1.16.9"])
def test_supported_versions(version):
    compat.require_supported(version)


@pytest.mark.parametrize("version", ["1.11.9", "0.24.0", "1.17.0", "1.17.0.dev0", "2.0"])
def test_an_unsupported_version_is_one_sentence(version):
    with pytest.raises(ImportError) as raised:
        compat.require_supported(version)
    message = str(raised.value)
    assert f"trl {version} is installed" in message and "pip install 'trl>=1.12,<1.17'" in message
    assert "\n" not in message


def test_the_version_is_looked_at_on_import(monkeypatch):
    import importlib

    monkeypatch.setattr(compat.trl, "__version__", "1.9.0")
    with pytest.raises(ImportError, match=r"trl 1\.9\.0 is installed"):
        importlib.reload(compat)
    monkeypatch.undo()


@pytest.mark.parametrize("name", compat.PRIVATE)
def test_private_methods_have_the_signatures_relied_on(name):
    assert list(inspect.signature(getattr(DistillationTrainer, name)).parameters) == compat.PRIVATE[name]


def test_the_trainer_overrides_nothing_else():
    theirs = {name for base in DistillationTrainer.__mro__[:-1] for name in vars(base)}
    overridden = {name for name, value in vars(PurifiedOPSDTrainer).items() if callable(value) and name in theirs}
    expected = {"__init__", "_set_signature_columns_if_needed", "_generate_and_score_completions", "compute_loss"}
    expected |= {"create_model_card"}
    assert overridden == expected | {"_get_train_sampler", "_tokenize_prompts", "evaluation_loop"}
    guarded = {name for name, value in vars(GuardedTrainer).items() if callable(value) and name in theirs}
    assert guarded == {"train", "save_model", "_prepare_inputs", "_generate_single_turn"}


def test_what_generation_returns(tmp_path):
    trainer = build(tmp_path, cls=PurifiedOPSDTrainer)
    prompts = [trainer._prompts(problem_of(row)).question for row in ROWS[:3]]
    batch = DistillationTrainer._generate_and_score_completions(trainer, [{"prompt": ids} for ids in prompts])
    assert set(compat.GENERATED) <= batch.keys()
    assert all(len(batch[name]) == 3 for name in compat.GENERATED[:-1])
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert unpad(batch["prompt_ids"], batch["prompt_mask"]) == prompts
    theirs = DistillationTrainer._tokenize_prompts(trainer, [row["prompt"] for row in ROWS[:3]])
    assert [list(ids) for ids in theirs[0]] == prompts, "what TRL would have made of the same texts"
    assert trainer._tokenize_prompts(prompts) == (prompts, *theirs[1:])
    assert trainer._metrics["train"]["completions/mean_length"]


def test_trl_shuffles_and_splits_lists_with_the_tensors():
    """The rows' lengths travel as a list, so that they stay on the host."""
    batch = {"ids": torch.arange(6), "lengths": [(i, i + 1) for i in range(6)], "count": torch.tensor(3)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 3)
    assert [len(part["lengths"]) for part in parts] == [2, 2, 2]
    for part in parts:
        assert part["lengths"] == [(i, i + 1) for i in part["ids"].tolist()] and part["count"] == 3


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


def test_the_documented_patch_changes_nothing_but_the_speed(tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import DistillationConfig

    monkeypatch.setattr(
        trl_module, "_chunked_divergence_loss", trl_module._chunked_divergence_loss
    )  # restored at the end
    trl_loss(*torch.ones(2, 1, 1, 2), *torch.ones(2, 3, 2), torch.ones(1, 1), 0.5)  # skips where it does not run
    path = Path(__file__).parents[3] / "examples" / "fast_jsd_for_trl.py"
    losses = []
    for patched in (False, True):
        if patched:
            spec = importlib.util.spec_from_file_location("fast_jsd_for_trl", path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            assert trl_module._chunked_divergence_loss is fast_jsd.chunked_divergence_loss
        trainer = type("Fixed", (DistillationTrainer,), {"_generate_single_turn": FixedTrainer._generate_single_turn})(
            model=tiny(),
            teacher_model=tiny(seed=3),
            args=DistillationConfig(
                output_dir=str(tmp_path),
                beta=0.3,
                learning_rate=1e-2,
                max_completion_length=6,
                max_steps=2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=build_tokenizer(),
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] > 0.01
