"""Help and usage errors: what they say, and that nothing which takes time is imported for them."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from popsd_integrations import cli
from popsd_integrations.commandline import inherited, kinds, options, training

ROOT = Path(__file__).parents[2]
AT_ONCE = {
    "": "required: command",
    "trian": "Did you mean train?",
    "train --dry_runn": "unrecognized arguments: --dry_runn. Did you mean --dry_run?",
    "train --max_steps": "argument --max_steps: expected one argument",
    "train --max_steps many": "--max_steps: expected a whole number; got 'many'",
    "train --beta half": "--beta: expected a number; got 'half'",
    "train --use_peft maybe": "--use_peft: expected true or false; got 'maybe'",
    "train --lr_scheduler_type constnat": "Did you mean constant?",
    "train --on_overflow drpo": "Did you mean drop?",
    "train": "model_name_or_path: expected a model; got none",
    "train --model_name_or_path a/b": "dataset_name: expected it or a mixture",
    "train --model_name_or_path a/b --dataset_name no.jsonl": "got 'no.jsonl' (there is no such file)",
    "train --model_name_or_path /no/where --dataset_name a/b": "there is no folder '/no/where'",
    "train --config no.yaml": "config: expected a YAML file that can be read; got 'no.yaml' (No such file or directory)",
    "train --model_name_or_path a/b --dataset_name c --loss_target purfied": "loss_target: expected one of purified, opsd",
    "train --model_name_or_path a/b --dataset_name c --masks {a": "masks: expected a JSON object such as",
    "train --model_name_or_path a/b --dataset_name c --resume_from_checkpoint nowhere": "there is no folder 'nowhere'",
    "diagnose --pmi_bta 1": "popsd diagnose: unrecognized arguments: --pmi_bta 1. Did you mean --pmi_beta?",
    "diagnose --diagnose_dri x": "Did you mean --diagnose_dir?",
    "diagnose --model_name_or_path a/b --dataset_name c --dry_run": "dry_run: expected none with diagnose",
    "evaluate --model_init_kwargs []": "argument --model_init_kwargs: expected a JSON object such as",
    "evaluate": "model_name_or_path: expected one; got none. Pass --model_name_or_path.",
    "evaluate --model_name_or_path a --benchmarks no.jsonl": "benchmarks: expected a file; there is none at no.jsonl",
    "evaluate --model_name_or_path /no/where --benchmarks b": "there is no folder '/no/where'",
    "evaluate --model_name_or_path a --benchmarks b --adapters /no/where": "adapters: expected a local folder",
    "evaluate --from no.jsonl": "--from: expected a generations.jsonl; there is no file no.jsonl",
    "init": "popsd init: the following arguments are required: MODEL, DATA. See popsd init --help.",
    "init a b --output /no/where.yaml": "output: expected a .yaml file in a folder that exists; got /no/where.yaml",
    "init a b --output pyproject.toml": "output: expected a file that is not there yet; got pyproject.toml",
    "init /no/where b": "there is no folder '/no/where'",
    "init a no.jsonl": "got 'no.jsonl' (there is no such file)",
    "init a b --device tpu": "device: expected one of rtx3090",
    "demo --steps_": "popsd demo: unrecognized arguments: --steps_.",
    "compare": "popsd compare: the following arguments are required: runs",
    "doctor --gpu": "popsd doctor: unrecognized arguments: --gpu. See popsd doctor --help.",
}
OLD_NAMES = {
    "train": "eval_max_new_tokens=eval_max_completion_length scorer=eval_scorer lr=learning_rate",
    "diagnose": "completions=diagnose_problems",
    "evaluate": "model=model_name_or_path samples=num_generations engine=use_vllm max_new_tokens=max_completion_length "
    "question_column=prompt_column split=dataset_test_split scorer=eval_scorer engine_kwargs=model_init_kwargs "
    "batch_size=per_device_eval_batch_size",
    "demo": "seeds=num_seeds steps=max_steps lora=use_peft processes=num_processes",
}
AT_ONCE |= {
    f"{command} --{old} 1": f"Did you mean --{new}?"
    for command, names in OLD_NAMES.items()
    for old, _, new in (name.partition("=") for name in names.split())
}
HELP = ["", "train", "diagnose", "init", "evaluate", "demo", "compare", "doctor", "examples"]
SCRIPT = f"""
import contextlib, io, sys
from popsd_integrations import cli
for arguments in {[*AT_ONCE, *(f"{command} --help" for command in HELP)]!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = cli.main(arguments.split())
        except SystemExit as stopped:
            status = stopped.code
    lines = said.getvalue().splitlines()
    print(arguments, status, len(lines), lines[0], sep="\\t")
print([name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules])
"""


def test_help_and_usage_errors_answer_before_anything_is_imported():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=ROOT)
    *answers, imported = done.stdout.splitlines()
    assert imported == "[]"
    for answer in answers:
        arguments, status, lines, first = answer.split("\t")
        if arguments.endswith("--help"):
            assert status == "0" and int(lines) <= 60, answer
        else:
            assert (status, lines) == ("2", "1"), answer
            assert AT_ONCE[arguments] in first and first.startswith("popsd"), answer


def test_help_takes_less_than_a_second_of_computing():
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    started = subprocess.Popen(
        [sys.executable, "-m", "popsd_integrations.cli", "train", "--help"], stdout=subprocess.PIPE, env=environment
    )
    assert started.stdout.read()
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = status
    assert status == 0 and used.ru_utime + used.ru_stime < 1.0


def test_the_short_help_has_all_own_options_a_line_each():
    text = training.short_help()
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 120
    own = options.own_options()
    assert set(own) <= {name.removeprefix("--") for name in re.findall(r"--\w+", text)}
    grouped = " ".join(options.GROUPS.values()).replace("+", " ").split()
    assert set(grouped) <= set(own) and len(grouped) == len(set(grouped))


def test_targets_are_those_that_are_registered():
    popsd = pytest.importorskip("popsd")
    from popsd.engine.chunks.registry import target_named

    assert popsd.presets and all(target_named(name, "loss_target") for name in options.LOSS_TARGETS)


def test_the_source_tells_what_trls_parser_takes():
    """Names, number of values, choices and kinds, of the installed versions."""
    trl = pytest.importorskip("trl")
    parser = trl.TrlParser((trl.ScriptArguments, trl.DistillationConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    found = inherited.inherited()
    assert set(found) == {action.dest for action in parser._actions} - {"help"}
    for action in parser._actions:
        if action.dest == "help" or isinstance(action, argparse._StoreFalseAction):
            continue
        own = argparse.ArgumentParser()
        found[action.dest].add_to(own)
        read = own._actions[1]
        assert read.nargs == action.nargs, action.dest
        assert read.choices is None or tuple(read.choices) == tuple(action.choices), action.dest
        kind = getattr(action.type, "__name__", "")
        assert (kind in ("int", "float")) == (found[action.dest].kind == kind), action.dest
        assert (kind == "string_to_bool") == (found[action.dest].kind == "bool"), action.dest


def test_another_layout_of_trl_is_imported_instead(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(inherited, "SOURCES", (("trl/elsewhere.py", "ModelConfig"),))
    inherited.inherited.cache_clear()
    found = inherited.inherited()
    inherited.inherited.cache_clear()
    assert found.keys() == inherited.inherited().keys() and found["max_steps"].kind == "text"


def test_without_trl_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(inherited, "find_spec", lambda name: None)
    inherited.inherited.cache_clear()
    inherited._classes.cache_clear()
    assert cli.main(["train", "--max_steps", "1"]) == 2
    assert capsys.readouterr().err == "popsd train needs transformers: pip install 'popsd[trl]'\n"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    inherited._classes.cache_clear()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pmi_bta: 1", "got 'pmi_bta'. Did you mean pmi_beta?"),
        ("max_steps: many", "max_steps: expected a whole number; got 'many' in "),
        ("beta: true", "beta: expected a number; got True in "),
        ("beta: [0.5]", r"beta: expected a number; got [0.5] in "),
        ("eval_strategy: no", "got False. Write it in quotes, or it is a truth value in YAML in "),
        ("max_steps: null", "max_steps: expected a whole number; got None in "),
        ("- beta", "config: expected lines of 'option: value' in "),
        ("beta: [", "config: expected a YAML file that can be read"),
        ("", "config: expected lines of 'option: value' in "),
    ],
)
def test_what_a_file_may_say(text, message, tmp_path, capsys):
    pytest.importorskip("trl")
    (tmp_path / "train.yaml").write_text(text)
    assert cli.main(["train", "--config", str(tmp_path / "train.yaml")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_numbers_as_text_and_none_are_values_of_a_file():
    number, optional = kinds.option("beta", "float", 0.5), kinds.option("vocab_size", "int | None")
    assert number.problem("5e-6") == number.problem(1) == optional.problem(None) == ""
    assert number.problem(None) and optional.problem(1.5)
