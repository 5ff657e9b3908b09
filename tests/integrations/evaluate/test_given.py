"""What the options of ``popsd evaluate`` say, before anything is generated."""

import json
import shutil
from dataclasses import replace

import pytest
from evaluate_files import SCORER, TINY, arguments, change, save_adapter, save_all, save_model

from popsd_integrations.cli import main
from popsd_integrations.miniature import warmup

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("evaluate"))


def test_prompts_and_problems_are_what_the_options_say(files, tmp_path):
    """Columns and split of a folder, system prompt and template of a chat; nothing is generated."""
    from popsd_integrations import cli
    from popsd_integrations.evaluate import command

    shutil.copytree(files / "base", tmp_path / "chat")
    settings = tmp_path / "chat" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'CHECK' if thinks else 'A' }}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    (tmp_path / "chat" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "data").mkdir()
    for split, number in (("train", 1), ("validation", 2)):
        row = {"ask": f"{number}", "is": f"{number} {number}", "question": "7", "answer": "7"}
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    given = ["--model_name_or_path", str(tmp_path / "chat"), "--benchmarks", f"mine={tmp_path / 'data'}"]
    given += [
        "--prompt_column",
        "ask",
        "--answer_column",
        "is",
        "--dataset_test_split",
        "validation",
        "--seed",
        "5",
        "--max_completion_length",
        "12",
    ]
    given += [
        "--question_template",
        "Q {question}",
        "--system_prompt",
        "OK",
        "--chat_template_kwargs",
        '{"thinks": true}',
    ]
    options = cli.build_parser()[0].parse_args(["evaluate", *given, "--eval_scorer", SCORER, "--use_vllm", "false"])
    job = command._checked(options)
    (task,), (prompt,) = job.tasks["mine"], job.prompts.values()
    assert (task.question, task.answer) == ("2", "2 2") and job.tokenizer.decode(prompt) == "OK Q 2 CHECK"
    assert (job.config.engine, job.config.seed, job.samples, job.batch_size) == ("transformers", 5, 12, 8)
    options.dataset_test_split = "test"
    with pytest.raises(ValueError, match=r"dataset_test_split: expected one of \['train', 'validation'\]"):
        command._checked(options)


BAD = {
    "no model": (["--model_name_or_path", ""], "model_name_or_path: expected one; got none. Pass --model_name_or_path"),
    "no such model": (
        ["--model_name_or_path", "{files}/no"],
        "model_name_or_path: expected a name on the Hub or a local folder",
    ),
    "no such benchmark": (["--benchmarks", "{files}/no.jsonl"], "benchmarks: expected a file; there is none at"),
    "no answers": (["--answer_column", "solution"], "answer_column: expected solution in a; got the columns ['answer'"),
    "an empty answer": (["--benchmarks", "{files}/empty.jsonl"], "got '' in problem 1 of empty"),
    "an answer nobody parses": (
        ["--benchmarks", "{files}/odd.jsonl", "--eval_scorer", "math"],
        r"problem 0 of odd: answer: expected one that math-verify can parse; got '\\frac'",
    ),
    "a label twice": (
        ["--benchmarks", "{files}/a.jsonl", "{files}/a.jsonl"],
        "expected each label once; got 'a' again",
    ),
    "no checkpoint": (["--adapters", "{files}"], "adapters: expected a folder with adapter_config.json"),
    "an adapter of another size": (["--adapters", "{files}/wide"], "has 16 outputs; got 32 in"),
    "an adapter of another name": (
        ["--adapters", "{files}/other"],
        "is one of Some/Other-Model. Pass that as --model_name_or_path",
    ),
    "a whole model of another size": (["--adapters", "{files}/wide_base"], "with hidden_size 16; got 32"),
    "no vllm": (["--use_vllm"], "use_vllm: expected an engine that is installed; vllm is not"),
    "greedy samples": (["--temperature", "0"], "num_generations: expected 1 at temperature 0"),
    "top_p": (["--top_p", "1.5"], "top_p: expected a number in (0, 1]"),
    "too many tokens": (["--max_completion_length", "500"], "max_completion_length: expected at most 120"),
    "no such scorer": (["--eval_scorer", "nothing"], "eval_scorer: expected 'math' or an importable module:function"),
    "a template": (["--question_template", "Q"], "question_template: expected the fields"),
    "no samples": (["--num_generations", "0"], "expected at least 1; got 0"),
    "no batch": (["--per_device_eval_batch_size", "0"], "expected at least 1; got 0"),
}


@pytest.fixture(scope="module")
def bad_files(files):
    (files / "empty.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": "1", "answer": ""}\n')
    (files / "odd.jsonl").write_text('{"question": "1", "answer": "\\\\frac"}\n')
    save_model(files / "wide_base", warmup.build_model(replace(TINY, hidden_size=32)))
    save_adapter(files / "wide", files / "wide_base")
    change("base_model_name_or_path", None)(files / "wide" / "adapter_config.json")
    save_adapter(files / "other", files / "base")
    change("base_model_name_or_path", "Some/Other-Model")(files / "other" / "adapter_config.json")
    return files


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_generated(case, bad_files, tmp_path, monkeypatch, capsys):
    from popsd_integrations.evaluate import engines

    if case == "an answer nobody parses":
        pytest.importorskip("math_verify")
    monkeypatch.setattr(engines, "make_engine", lambda *_: pytest.fail("an engine was made"))
    if case == "no vllm":
        monkeypatch.setattr(engines, "find_spec", lambda name: None)
    options, message = BAD[case]
    options = [x.replace("{files}", str(bad_files)) for x in options]
    assert main(arguments(bad_files, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
