"""The trainer under faults. What a kill leaves is tried in tests/integrations/faults."""

import os
import re
import signal

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback
from trl_helpers import FixedTrainer, build, logs

from popsd_integrations.run_folder import exclusive
from popsd_integrations.trl_trainer.callbacks import newest_whole_checkpoint

UNCHECKED = {"loss_kwargs": {"check_finite": False}}


class Poison(FixedTrainer):
    """Makes the embedding of token 0 not finite in given steps, in the loss's forwards of student and frozen weights."""

    bad_steps, is_in_loss = (), False

    def _generate_and_score_completions(self, inputs):
        if not hasattr(self, "hooks"):
            models = {id(model): model for model in (self.model, self.teacher_model) if model}.values()
            self.hooks = [model.get_input_embeddings().register_forward_hook(self.hook) for model in models]
        return super()._generate_and_score_completions(inputs)

    def hook(self, module, args, output):
        bad = (args[0] == 0) & (self.state.global_step + 1 in self.bad_steps) & torch.tensor(self.is_in_loss)
        return torch.where(bad[..., None], torch.nan, output)

    def _loss(self, student, inputs, *rest):
        self.is_in_loss = True
        try:
            return super()._loss(student, inputs, *rest)
        finally:
            self.is_in_loss = False


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_is_refused_and_its_rows_are_named(tmp_path, caplog, accumulation):
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = build(tmp_path, cls=Poison, max_steps=3, **UNCHECKED, **options)
    trainer.bad_steps, weights = (2,), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            weights.append([p.detach().clone() for p in model.parameters()])

    trainer.add_callback(Watch())
    trainer.train()
    assert [row["step_refused"] for row in logs(trainer)] == [0, 1, 0]
    first, second, third = weights
    assert all(map(torch.equal, first, second)) and not all(map(torch.equal, second, third))
    named = set(re.findall(r"'(Q \d \d A)'", caplog.text))
    assert len(named) == 5 and all("0" in question for question in named)


def test_a_run_of_nothing_but_such_steps_ends_and_its_checkpoints_stay(tmp_path):
    trainer = build(tmp_path, cls=Poison, max_steps=9, save_strategy="steps", save_steps=1, lora=True, **UNCHECKED)
    trainer.bad_steps = range(2, 9)
    with pytest.raises(FloatingPointError, match=r"got 3 steps in a row.*step 4\. Rows that are not finite: '"):
        trainer.train()
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    trainer = build(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"parameters: expected finite numbers.*\(1 tensors\)"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    trainer = build(tmp_path)
    with exclusive(tmp_path), pytest.raises(ValueError, match="output_dir: expected a folder that no other run"):
        trainer.train()
    trainer.train()


def test_the_newest_whole_checkpoint_is_resumed(tmp_path):
    common = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "frozen_weights": "ema"}
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected a whole checkpoint.*Leave it out"):
        build(tmp_path, **common).train(resume_from_checkpoint=True)
    unbroken = build(tmp_path, **common)
    unbroken.train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    resumed = build(tmp_path, **common)
    resumed.train(resume_from_checkpoint=True)
    assert logs(resumed)[-1]["step"] == 3 and len(logs(resumed)) == 3
    for one, other in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_moving_average_is_there_before_what_makes_a_checkpoint_whole(tmp_path, monkeypatch):
    """And so before an older checkpoint is removed, which transformers does last."""
    trainer, order = build(tmp_path, save_strategy="steps", save_steps=1, frozen_weights="ema"), []
    real = trainer.state.__class__.save_to_json

    def seen(state, path):
        order.append(sorted(os.listdir(os.path.dirname(path))))
        real(state, path)

    monkeypatch.setattr(trainer.state.__class__, "save_to_json", seen)
    trainer.train()
    assert "popsd_ema.pt" in order[0] and "trainer_state.json" not in order[0]


def test_sigterm_finishes_the_step_and_saves_it(tmp_path):
    trainer = build(tmp_path, max_steps=5)

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Ask())
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert newest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = build(tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    unbroken = build(tmp_path / "unbroken", max_steps=5)
    unbroken.train()
    for one, other in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
