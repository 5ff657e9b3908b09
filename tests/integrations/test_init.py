"""``popsd init``: what it finds, and that ``popsd train --config FILE --dry_run`` takes the file as it is."""

import json
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
import yaml

from popsd_integrations import cli
from popsd_integrations.init.columns import chosen_columns
from popsd_integrations.init.page import Page

TINY = Path(__file__).parents[2] / "examples/reproduce/tiny.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with a padded head and a thinking flag, and problems with solutions and answers."""
    folder = tmp_path_factory.mktemp("init")
    runpy.run_path(str(TINY))["main"](folder)
    return folder


def init(files, output, *more, data="data"):
    return cli.main(["init", str(files / "model"), str(files / data), "--output", str(output), *more])


def test_the_file_passes_the_dry_run_as_it_is(files, tmp_path, capsys):
    output = tmp_path / "train.yaml"
    assert init(files, output) == 0
    printed = capsys.readouterr().out
    assert f"Written: {output}" in printed and "reference-only teacher: the solution without" in printed
    text, values = output.read_text(), yaml.safe_load(output.read_text())
    assert (values["prompt_column"], values["solution_column"], values["vocab_size"]) == ("problem", "solution", 261)
    assert values["text_as_conversation"] is True and values["chat_template_kwargs"] == {"enable_thinking": False}
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (4, 1)  # of six problems
    assert (values["max_prompt_length"], values["on_overflow"]) == (40960 - 1024, "drop")
    assert ("use_cpu" in values) == (not torch.accelerator.is_available())
    for said in (
        "# data: columns of the split 'train': problem, solution, answer",
        "tokens in the prompt of the teacher: the question and its solution: 0 % 192, 50 % 193",
        "5 of the head's 266 rows are padding",
        "the question alone: 39 tokens, thinking closed",
        "logits in the loss, at most",
        "1 steps per epoch, of 4 problems each; 6 problems are used",
        "#answer_column: answer",
        "#test_split_size: 0.05",
    ):
        assert said in text, said
    assert cli.main(["train", "--config", str(output), "--dry_run"]) == 0
    assert "1 steps per epoch, of 4 problems each" in capsys.readouterr().out
    before = output.read_bytes()
    assert init(files, output) == 2
    assert f"output: expected a file that is not there yet; got {output}" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_other_splits_columns_and_devices(files, tmp_path, capsys):
    """Conversations need no text_as_conversation; a device that is not here is planned for; the only split is taken."""
    rows = [{"ask": [{"role": "user", "content": f"{n}?\n# x: 1"}], "why": f"{n}", "id": n} for n in range(40)]
    (files / "other").mkdir()
    (files / "other" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--prompt_column", "ask", "--solution_column", "why", "--device", "24GiB"]
    assert init(files, tmp_path / "train.yaml", *more, data="other") == 0
    values = yaml.safe_load((tmp_path / "train.yaml").read_text())
    assert values["dataset_train_split"] == "validation" and "text_as_conversation" not in values
    assert (values["bf16"], values["dtype"]) == (True, "bfloat16") and "use_cpu" not in values
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (4, 8)
    text = (tmp_path / "train.yaml").read_text()
    assert "24GiB" in text and "It needs a column with the answers alone" in text
    capsys.readouterr()
    assert cli.main(["train", "--config", str(tmp_path / "train.yaml"), "--dry_run"]) == 0
    assert "1 steps per epoch, of 32 problems each; 40 problems are used" in capsys.readouterr().out
    assert init(files, tmp_path / "no.yaml", "--device", "0.001GiB") == 2
    assert "device: expected one with more than" in capsys.readouterr().err and not (tmp_path / "no.yaml").exists()


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            [{"text": "a", "label": 1}],
            [],
            "prompt_column: expected a column with the questions, called prompt, problem",
        ),
        (
            [{"problem": "a", "label": "b"}],
            [],
            "solution_column: expected a column with the reference solutions, called",
        ),
        (
            [{"problem": "a", "solution": "b"}],
            ["--prompt_column", "ask"],
            "prompt_column: expected one of the columns ['",
        ),
        ([{"problem": "a", "solution": ""}], [], "train_dataset, row 0: solution: expected non-empty text; got ''"),
        (
            [{"problem": "a", "solution": "b"}],
            ["--dataset_train_split", "all"],
            "dataset_train_split: expected one of the",
        ),
        ([{"problem": "a", "solution": "b"}], ["--dataset_config", "hard"], "BuilderConfig 'hard' not found"),
        ([], [], "dataset_name: expected a name on the Hub, a folder or a file of rows"),
    ],
)
def test_data_that_will_not_do_is_refused_and_nothing_is_written(files, tmp_path, capsys, rows, more, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["init", str(files / "model"), str(tmp_path / "data"), "--output", str(tmp_path / "train.yaml"), *more]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    line = next(x for x in printed.splitlines() if x.startswith("popsd init: "))
    assert message in line and not (tmp_path / "train.yaml").exists()


def test_columns_are_chosen_by_their_names():
    assert chosen_columns(["id", "question", "answer"], None, None) == ("question", "answer", None)
    assert chosen_columns(["problem", "solution", "answer"], None, None) == ("problem", "solution", "answer")
    assert chosen_columns(["problem", "solution", "mine"], None, "mine").solution == "mine"
    with pytest.raises(ValueError, match="expected another column than prompt_column"):
        chosen_columns(["problem", "solution"], "problem", "problem")


def test_text_of_the_data_cannot_leave_its_comment():
    page = Page()
    page.section("data", "a\nbeta: 9\u2028\u0085b")
    page.line("dataset_name", "x: [# y", "why\r\nbeta: 8")
    assert yaml.safe_load(page.text()) == {"dataset_name": "x: [# y"} and page.text().count("\n") == 3
