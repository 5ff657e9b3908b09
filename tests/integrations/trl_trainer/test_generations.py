"""Several completions of each prompt in the trainer: which rows a step takes, what it logs, what it resumes to."""

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from trl_helpers import ROWS, FixedTrainer, build, config, logs, tiny

from popsd_integrations.trl_trainer import PurifiedOPSDTrainer


class Watched(PurifiedOPSDTrainer):
    """Keeps the prompts of each generation, and the shapes of input ids that the model is run on meanwhile."""

    def _generate_and_score_completions(self, inputs):
        self.__dict__.setdefault("asked", []).append([row["prompt"] for row in inputs])
        seen = self.__dict__.setdefault("shapes", [])
        hook = self.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            hook.remove()


def test_a_step_takes_all_completions_of_its_prompts_and_runs_resume(tmp_path):
    options = {"num_generations": 2, "max_steps": 4, "shuffle_dataset": True, "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path / "whole", cls=Watched, **options)
    whole.train()
    assert all(len(asked) == 4 and asked[::2] == asked[1::2] for asked in whole.asked) and len(whole.asked) == 4
    assert sorted(prompt for asked in whole.asked for prompt in asked[::2]) == sorted(row["prompt"] for row in ROWS)
    assert whole.state.epoch == 1
    for row in logs(whole):
        assert 0 < row["prompts/distinct"] <= 1 and row["prompts/length_std"] >= 0 and row["prompts/markers_std"] >= 0
    assert (2, 3) in whole.shapes, "two prompts of four tokens, without their last"
    assert {rows for rows, tokens in whole.shapes if tokens > 1} == {2}, "and no prompt for each completion"

    resumed = build(tmp_path / "whole", cls=Watched, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.asked == whole.asked[2:]
    for row, expected in zip(logs(resumed)[-2:], logs(whole)[-2:], strict=True):
        assert {row[x] == expected[x] for x in ("loss", "grad_norm", "prompts/distinct", "prompts/length_std")} == {
            True
        }


def test_equal_completions_are_not_distinct_and_evaluation_has_one_of_each(tmp_path):
    trainer = build(
        tmp_path, num_generations=4, eval_rows=ROWS[:4], per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.train()
    assert (logs(trainer)[0]["prompts/distinct"], logs(trainer)[0]["prompts/length_std"]) == (0.25, 0)
    assert not any("prompts/" in name for name in trainer.evaluate())
    one = build(tmp_path, num_generations=1, max_steps=1, per_device_train_batch_size=1)
    one.train()
    assert logs(one)[0]["loss"] == pytest.approx(logs(trainer)[0]["loss"], rel=1e-5), (
        "a prompt four times is that prompt"
    )


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"num_generations: expected a divisor of the 4 completions .*× gradient_acc.*; got 3"
    ):
        config(tmp_path, num_generations=3)
    with pytest.raises(ValueError, match=r"num_generations: expected at least 1; got 0"):
        config(tmp_path, num_generations=0)
    with pytest.raises(ValueError, match=r"generation_kwargs: expected no 'n'; got 2. num_generations samples several"):
        config(tmp_path, generation_kwargs={"n": 2})
    with pytest.raises(ValueError, match=r"train_dataset: expected at least the 16 rows of one step .* got 8"):
        build(tmp_path, num_generations=2, per_device_train_batch_size=32).train()
    with pytest.raises(ValueError, match=r"train_dataset: .*num_generations=2; got a stream"):
        FixedTrainer(tiny(), config(tmp_path, num_generations=2), Dataset.from_list(ROWS).to_iterable_dataset())
