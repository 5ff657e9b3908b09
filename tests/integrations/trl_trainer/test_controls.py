"""Controls: what of a gain needs the reference solution, by giving the contexts another problem's, or none."""

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from trl_helpers import ROWS, build, config

from popsd_integrations.trl_trainer.dataset import problem_of, with_other_solutions


def test_controls_reach_the_batch(tmp_path):
    """The teacher's prompts of every row, whichever way the data is shuffled, and the same ones a second time."""
    found = []
    for folder in ("a", "b"):
        trainer = build(tmp_path / folder, loss_target="opsd", teacher_reference="other_problem", max_steps=1)
        trainer.train()
        found.append([trainer._prompts(problem_of(row)) for row in trainer.train_dataset])
    assert found[0] == found[1]
    solutions = {row["privileged_context"] for row in ROWS}
    for row, prompts in zip(ROWS, found[0], strict=True):
        text = trainer.processing_class.decode(prompts.teacher)
        assert text != f"{row['prompt']} R {row['privileged_context']} OK A"
        assert text in {f"{row['prompt']} R {solution} OK A" for solution in solutions}
    control = build(tmp_path / "none", loss_target="opsd", teacher_reference="none")
    assert all(row[0] == row[1] for row in (control._prompts(problem_of(row)) for row in ROWS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "none", "loss_target": "beta_opsd"}, "reference: expected None with loss_target='beta_opsd'"),
        ({"reference": "none", "loss_target": "contrastive_hints"}, "reference: expected None .*is the wrong hint"),
        ({"reference": "wrong_hint"}, "reference: expected None .*'wrong_hint' nowhere else"),
        ({"teacher_reference": "wrong"}, "teacher_reference: expected one of"),
    ],
)
def test_contexts_that_a_target_does_not_read_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_another_problem_needs_a_whole_dataset_of_two(tmp_path):
    args, data = config(tmp_path, reference="other_problem"), Dataset.from_list(ROWS)
    for dataset, message in (
        (data.to_iterable_dataset(), "a: expected a datasets.Dataset for 'other_problem'.*got a stream"),
        (data.select([0]), "a: other_problem: expected problems of at least two different solutions; got 1"),
        (with_other_solutions(data, "a", args), "a: expected no column 'other_privileged_context'"),
    ):
        with pytest.raises(ValueError, match=message):
            with_other_solutions(dataset, "a", args)
