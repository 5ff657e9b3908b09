"""Accuracy on held-out problems while the trainer trains, and the files of its run."""

import json
import sys

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from trl_helpers import EOS, ROWS, FixedTrainer, build, config, logs, tiny

from popsd_integrations.cli import main
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.runs import held_out, report
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer

ANS = VOCABULARY.index("ANS")
SCORER = "popsd_integrations.miniature.task:verdict"
JUDGED = [{**row, "answer": f"{row['prompt'].split()[1]} 9"} for row in ROWS]
EVALUATED = {"eval_rows": JUDGED, "eval_strategy": "steps", "eval_steps": 1, "eval_scorer": SCORER}
COMMON = {
    "cls": PurifiedOPSDTrainer,
    "max_steps": 4,
    "shuffle_dataset": True,
    "save_strategy": "steps",
    "save_steps": 1,
}


class Answering(FixedTrainer):
    """Greedily all answers are right; sampled those of the digits 2 and 3 are. Asked for long ones, it pads with 7s."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        longest = self.generation_config.max_new_tokens
        wrong = self.generation_config.do_sample
        rows = [[ANS, ids[1], 9 if ids[1] > 1 or not wrong else 8, EOS] for ids in prompt_ids]
        return [[7] * (longest - len(row)) + row for row in rows]


def test_accuracy_is_the_scorers_and_completions_are_logged(tmp_path):
    trainer = build(
        tmp_path, cls=Answering, max_steps=2, eval_max_completion_length=9, per_device_eval_batch_size=3, **EVALUATED
    )
    trainer.train()
    rows = logs(trainer, "eval_loss")
    assert [(row["eval_accuracy"], row["eval_accuracy_greedy"], row["eval_truncated"]) for row in rows] == [
        (0.5, 1, 0)
    ] * 2
    # what is trained on stays as long as it was, and so does what the loss is measured on
    assert rows[0]["eval_completions/mean_length"] == 6 == logs(trainer)[0]["completions/mean_length"]
    records = held_out.read_lines(tmp_path / held_out.FILE)
    assert len(records) == 2 * 2 * len(ROWS) and {x["set"] for x in records} == {"eval"}
    assert {x["expected"] for x in records} == {row["answer"] for row in JUDGED}
    assert {x["question"] for x in records} == {row["prompt"] for row in ROWS} and {x["tokens"] for x in records} == {9}
    assert all(x["correct"] == (x["kind"] == "greedy" or x["question"][2] in "23") for x in records)


def test_several_sets_have_accuracies_of_their_own(tmp_path):
    sets = EVALUATED | {"eval_rows": {"a": JUDGED[:4], "b": JUDGED[3:]}, "eval_problems": 3}
    trainer = build(tmp_path, cls=Answering, **sets)
    found = trainer.evaluate()
    assert (found["eval_a_accuracy"], found["eval_b_accuracy"]) == (0.0, 2 / 3)  # the digits 0, 0, 1 and 1, 2, 2
    assert len(held_out.read_lines(tmp_path / held_out.FILE)) == 2 * 6


def test_a_stream_is_judged(tmp_path):
    def stream():
        yield from JUDGED[4:]

    trainer = Answering(
        model=tiny(),
        args=config(tmp_path, eval_scorer=SCORER, eval_problems=4),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=IterableDataset.from_generator(stream),
        processing_class=build_tokenizer(),
    )
    assert trainer.evaluate()["eval_accuracy"] == 1.0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = build(folder, **COMMON, **EVALUATED)
    trainer.train()
    return trainer, folder


def test_evaluation_changes_no_step(unbroken, tmp_path):
    plain = build(tmp_path, **COMMON | {"save_strategy": "no"})
    plain.train()
    assert [row["loss"] for row in logs(plain)] == [row["loss"] for row in logs(unbroken[0])]


def test_a_resumed_run_ends_with_the_same_files(unbroken, tmp_path):
    import shutil

    folder = shutil.copytree(unbroken[1], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-3")
    with open(folder / held_out.FILE, "a") as file:
        file.write('{"step": 4, "ki')
    resumed = build(folder, **COMMON, **EVALUATED)
    resumed.train(resume_from_checkpoint=True)
    assert (folder / held_out.FILE).read_text() == (unbroken[1] / held_out.FILE).read_text()
    names = ("loss", "eval_loss", "eval_accuracy", "eval_accuracy_greedy", "grad_norm")
    now, then = (
        [(row["step"], *(row.get(name) for name in names)) for row in held_out.read_lines(path / report.METRICS)]
        for path in (folder, unbroken[1])
    )
    assert now == then and len(now) == 4 + 4 + 1
    for one, other in zip(resumed.model.parameters(), unbroken[0].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_options_and_page_are_in_the_folder(unbroken):
    folder = unbroken[1]
    found = json.loads((folder / report.CONFIG).read_text())
    assert found["options"]["eval_scorer"] == SCORER and found["options"]["pmi_clip"] == 10.0
    assert found["data"] == {"train_dataset": len(ROWS), "eval_dataset": len(ROWS)} and "trl" in found["versions"]
    assert found["evaluate"] == ["--eval_scorer", SCORER]
    page = (folder / report.PAGE).read_text()
    assert "accuracy, held-out, greedy" in page and page.count("<details>") == len(ROWS) and "http" not in page
    saved, load, evaluate = report.how_to_go_on(folder)
    assert "4 checkpoints from checkpoint-1 to checkpoint-4" in saved and "checkpoint-4" in load
    assert f"--adapters {folder} --eval_scorer {SCORER}" in evaluate


def test_compare_reads_the_runs_of_the_trainer(unbroken, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # drawing takes longer than all else here
    assert main(["compare", *(f"{x}={unbroken[1]}" for x in "ab"), "--output_dir", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "comparison.json").read_text())["tables"]
    rows = {row[0]: row[1:] for row in table}
    last = logs(unbroken[0], "eval_loss")[-1]
    assert rows["accuracy, held-out, greedy"] == [f"{last['eval_accuracy_greedy']:.4g}"] * 2 + ["+0.00"]
    assert rows["accuracy, held-out"][2] == rows["markers per completion"][2] == "+0.00"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, {"eval_scorer": SCORER}, r"eval_scorer: expected None without an eval_dataset; got"),
        (None, {"eval_problems": 2}, r"eval_problems: expected None without an eval_dataset; got 2"),
        (JUDGED, {"eval_problems": 0}, r"eval_problems: expected at least 1; got 0"),
        (JUDGED, {"eval_max_completion_length": 9}, r"eval_max_completion_length: .* with eval_scorer None"),
        (
            JUDGED,
            {"eval_scorer": SCORER, "eval_max_completion_length": 5},
            r"expected at least max_completion_length \(6\)",
        ),
        (
            JUDGED,
            {"eval_scorer": SCORER, "eval_max_completion_length": 10**6},
            r"eval_dataset, row 0: expected at most",
        ),
        (JUDGED, {"eval_scorer": "nowhere"}, r"scorer: expected 'math' or an importable"),
        (ROWS, {"eval_scorer": SCORER}, r"eval_dataset: expected the column 'answer' for eval_scorer"),
        (
            [*JUDGED, {**JUDGED[0], "answer": None}],
            {"eval_scorer": SCORER},
            r"eval_dataset, row 8: answer: expected text",
        ),
    ],
)
def test_what_would_judge_nothing_is_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, eval_rows=rows, **options)
