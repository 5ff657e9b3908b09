"""The contract with TRL's private names, and the pieces that stand on them."""

import inspect

import pytest
import torch

pytest.importorskip("trl")

from trl import DistillationTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict
from trl_helpers import ROWS, build

from popsd_integrations.huggingface.packing import unpad
from popsd_integrations.trl_trainer import compat
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
