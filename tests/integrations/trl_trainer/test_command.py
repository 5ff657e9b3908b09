import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import yaml
from trl_helpers import config, files

from popsd.engine.workspace import CPU_WORKSPACE_MIB, GPU_WORKSPACE_MIB
from popsd_integrations import cli
from popsd_integrations.trl_trainer import command as train_command
from popsd_integrations.trl_trainer.dry_run import _printable

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def work(tmp_path):
    """A model and a dataset in folders, and a configuration that trains on them for two steps."""
    options = files(tmp_path, "data/train.jsonl") | {
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "learning_rate": 1e-2,
        "diagnostics_steps": 0,
        "plot_metrics": False,
        "use_peft": True,
        "lora_dropout": 0.0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def test_a_dry_run_prints_prompts_and_memory_and_trains_nothing(work, capsys):
    assert cli.main(["train", "--config", str(work / "config.yaml"), "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert (
        "=== prompt of the student and the base: the question alone: 4 tokens, thinking none\nQ 0 0 A\n    ids 11 0 0 13"
        in printed
    )
    assert "prompt of the teacher: the question and its solution: 10 tokens" in printed and "R 0 WAIT 0 OK A" in printed
    assert "weights" in printed and "copy of the initial weights" not in printed
    workspace = CPU_WORKSPACE_MIB if not torch.cuda.is_available() else GPU_WORKSPACE_MIB
    (logits,) = [line for line in printed.splitlines() if "logits in the loss, at most" in line]
    assert float(logits.split()[-2]) == pytest.approx(workspace / 1024, abs=1e-3)
    assert not (work / "out").exists()
    arguments = ["--config", str(work / "config.yaml"), "--dry_run", "true", "--use_peft", "false"]
    assert train_command.main(arguments) == 0
    assert "copy of the initial weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "151669"], r"vocab_size: expected at most \d+, the rows of the head; got 151669"),
        (["--gradient_accumulation_steps", "3"], r"train_dataset: expected at least the 12 rows of one step .*; got 8"),
    ],
)
def test_a_dry_run_refuses_what_training_would(work, flags, message):
    with pytest.raises(ValueError, match=message):
        train_command.main(["--config", str(work / "config.yaml"), "--dry_run", "true", *flags])


def test_a_dry_run_counts_what_a_length_limit_does_to_the_data(work, capsys):
    """Of the split that is trained on and of the one for evaluation; a row that training would refuse is named."""
    rows = [{"problem": "1", "answer": "1 " * length} for length in (4, 5, 9)]
    for split, kept in (("train", rows), ("test", rows[1:])):
        (work / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    flags = ["train", "--config", str(work / "config.yaml"), "--dry_run", "true", "--eval_strategy", "steps"]
    flags += ["--eval_steps", "1", "--per_device_train_batch_size", "1"]
    limit = ["--max_prompt_length", "11"]
    assert cli.main([*flags, *limit, "--on_overflow", "drop"]) == 0
    printed = capsys.readouterr().out
    assert "=== train_dataset: of 3 problems 1 are dropped and 0 have their solution cut" in printed
    assert "=== eval_dataset: of 2 problems 1 are dropped and 0 have" in printed
    assert "longer than max_prompt_length=11. The longest that stays has 11 tokens." in printed
    assert cli.main([*flags, *limit, "--on_overflow", "truncate"]) == 0
    assert "=== train_dataset: of 3 problems 0 are dropped and 1 have" in capsys.readouterr().out
    assert cli.main([*flags, *limit]) == 2
    assert "train_dataset, row 2: max_prompt_length: expected prompts of at most 11" in capsys.readouterr().err
    assert cli.main([*flags, "--dataset_streaming", "true"]) == 0
    assert "=== train_dataset: a stream, whose problems are looked at as they come" in capsys.readouterr().out


def test_a_dry_run_says_lengths_steps_and_the_device_and_holds_rows_out(work, capsys):
    flags = [
        "--config",
        str(work / "config.yaml"),
        "--dry-run",
        "--device",
        "24GiB",
        "--per-device-train-batch-size",
        "2",
    ]
    flags += ["--test_split_size", "0.25", "--eval_strategy", "steps", "--eval_steps", "1"]
    assert cli.main(["train", *flags]) == 0
    printed = capsys.readouterr().out
    assert "24GiB                                   24.000 GiB" in printed
    assert "of the teacher: the question and its solution: 0 % 10, 50 % 10, 90 % 10, 99 % 10, 100 % 10" in printed
    assert "3 steps per epoch, of 2 problems each; 6 problems are used" in printed
    assert "=== eval_dataset: of 2 problems 0" in printed
    assert "head of 22 rows, tokenizer of 22 tokens" in printed and "chat template: yes" in printed


def test_rows_held_out_are_the_same_each_time(work):
    script, args, _, mixture = train_command.read_options(
        ["--config", str(work / "config.yaml"), "--test_split_size", "0.25"]
    )
    first = train_command.load_data(script, mixture, args.seed)
    mixture.test_split_size = 0.25  # taken from it when it was read
    again = train_command.load_data(script, mixture, args.seed)
    assert first["test"]["prompt"] == again["test"]["prompt"] and len(first["test"]) == 2
    assert not {str(x) for x in first["test"]["prompt"]} & {str(x) for x in first["train"]["prompt"]}


@pytest.mark.parametrize("conversation", ["true", "false"])
def test_a_question_given_as_text_is_a_users_message(work, conversation):
    flags = ["--config", str(work / "config.yaml"), "--text_as_conversation", conversation]
    script, args, _, mixture = train_command.read_options(flags)
    (first,) = train_command.load_data(script, mixture, args.seed)["train"].select([0])["prompt"]
    assert first == ([{"role": "user", "content": "0 0"}] if conversation == "true" else "0 0")


def test_the_full_help_names_options_of_all(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    printed = capsys.readouterr().out
    assert "--pmi_beta" in printed and "--dry_run" in printed and "--lora_r" in printed


def test_flags_override_the_file_and_the_run_is_saved(work, capsys):
    assert cli.main(["train", f"--config={work / 'config.yaml'}", "--max_steps", "1", "--beta", "0.25"]) == 0
    assert (work / "out" / "adapter_model.safetensors").exists()
    options = torch.load(work / "out" / "training_args.bin", weights_only=False)
    assert (options.beta, options.max_steps, options.loss_target) == (0.25, 1, "purified")
    assert "2607.02234" in (work / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pmi_bta", "1"], r"pmi_bta.* Did you mean --pmi_beta\?"),
        (
            ["--prompt_column", "question"],
            r"prompt_column: expected one of the columns \['problem', 'answer'\] of the split 'train'; got 'question'",
        ),
        (["--pmi_beta", "0"], "pmi_beta: expected a positive"),
        (["--dataset_train_split", "all"], r"dataset_train_split: expected one of the splits \['train'\]; got 'all'"),
        (["--eval_strategy", "steps"], r"dataset_test_split: expected one of the splits \['train'\]; got 'test'"),
        (["--test_split_size", "1.5"], r"test_split_size: expected a share between 0 and 1; got 1\.5"),
        (["--test_split_size", "0.01"], r"test_split_size: expected rows on both sides; got 0\.01 of 8 rows"),
        (["--test_split_size", "0.5", "--dataset_test_split", "train"], r"got a split 'train', which evaluation takes"),
        (["--device", "h100"], r"device: expected none without dry_run"),
        (["--dry_run", "false", "--device", "h100"], r"device: expected none without dry_run"),
        (["--dry_run", "--device", "tpu"], r"device: expected one of rtx3090.*or an amount such as 24GiB; got 'tpu'"),
        (["--dry_run", "--device", "0.001GiB"], r"device: expected one with more than the .* GiB that this run holds"),
        (["--model_name_or_path", "no/where"], r"model_name_or_path: expected a name on the Hub or a local folder"),
        (
            ["--dry_run", "--model_name_or_path", "no/where"],
            r"model_name_or_path: expected a name on the Hub or a local",
        ),
        (["--masks", '{"floor": "x"}'], r"floor: expected a number; got 'x'"),
        (["--position_weights", '{"first": "x"}'], r"first: expected a number; got 'x'"),
        (["--model_init_kwargs", '{"foo": 1}'], r"model_init_kwargs: expected what .* can be made with; got"),
        (["--accelerator_config", "no.json"], r"No such file or directory: 'no.json'"),
        (["--output_dir", __file__], r"output_dir: expected a folder that can be written to; got"),
        (["--ignore_bias_buffers", "true"], r"ignore_bias_buffers: expected False"),
        (["--dataset_name", "missing.jsonl"], r"dataset_name: expected a name on the Hub, a folder or a file of rows"),
    ],
)
def test_bad_flags_are_an_exit_status_and_a_message(work, capsys, flags, message):
    import re

    with contextlib.suppress(SystemExit):
        assert cli.main(["train", "--config", str(work / "config.yaml"), *flags]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and len([x for x in printed.splitlines() if x.startswith("popsd train: ")]) == 1


def test_a_target_and_its_numbers_are_flags(work, capsys):
    flags = ["--config", str(work / "config.yaml"), "--loss_target", "arithmetic_mix", "--dry_run", "true"]
    assert cli.main(["train", *flags, "--target_parameters", '{"share": 0.25}']) == 0
    assert cli.main(["train", *flags, "--target_parameters", '{"part": 0.25}']) == 2
    assert "target 'arithmetic_mix': expected its numbers (share); got {'part': 0.25}" in capsys.readouterr().err
    assert cli.main(["train", *flags[:3], "none:mine", *flags[4:]]) == 2
    assert "loss_target: expected 'module:name' of a module on the path; got 'none:mine'" in capsys.readouterr().err


def test_options_of_an_adapter_that_is_not_trained_are_refused(work, capsys):
    options = yaml.safe_load((work / "config.yaml").read_text()) | {"use_peft": False, "lora_r": 8}
    (work / "config.yaml").write_text(yaml.safe_dump(options))
    assert cli.main(["train", "--config", str(work / "config.yaml")]) == 2
    assert "use_peft: expected true with lora_r, lora_dropout; got false" in capsys.readouterr().err


def test_a_misspelt_key_in_the_file_is_refused(work, capsys):
    options = yaml.safe_load((work / "config.yaml").read_text()) | {"pmi_bta": 1.0}
    (work / "config.yaml").write_text(yaml.safe_dump(options))
    assert cli.main(["train", "--config", str(work / "config.yaml")]) == 2
    assert "pmi_bta" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted([*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("reproduce/*.yaml")]), ids=lambda path: path.name
)
def test_examples_are_valid(path, tmp_path):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from popsd_integrations.trl_trainer.trainer import PurifiedOPSDConfig

    parser = TrlParser((train_command.TrainArguments, PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig))
    flags = ["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path), "--dataset_name", "x"]
    _, args, model, _ = parser.parse_args_and_config(flags)
    assert (model.lora_r, model.lora_dropout, model.dtype, args.learning_rate) == (64, 0.0, "bfloat16", 5e-6)
    processes = 8 if "8gpu" in path.name else 1
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * processes == 32


def test_the_last_whole_checkpoint_is_resumed(tmp_path):
    def found(value):
        return train_command.checkpoint_to_resume(config(tmp_path, resume_from_checkpoint=value))

    assert found(None) is None and found("false") is None and found("true") is None
    assert found("somewhere/checkpoint-7") == "somewhere/checkpoint-7"
    for step, content in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert found("true") == found(None) == str(tmp_path / "checkpoint-10")
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: expected a folder without checkpoints .*checkpoint-10"
    ):
        found("false")


def test_the_same_command_goes_on(work, capsys):
    arguments = ["train", "--config", str(work / "config.yaml"), "--save_steps", "1"]
    assert cli.main([*arguments, "--max_steps", "1"]) == 0
    first = (work / "out" / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    assert cli.main(arguments) == 0  # two steps
    assert (work / "out" / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == first
    assert [
        row["step"] for row in json.loads((work / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    ] == [1, 2]
    capsys.readouterr()
    assert cli.main([*arguments, "--beta", "0.25"]) == 2
    assert "got those of one with beta 0.5 (now 0.25)" in capsys.readouterr().err


def command(work, output, *flags):
    arguments = ["train", "--config", str(work / "config.yaml"), "--max_steps", "12", "--save_steps", "1"]
    arguments += ["--output_dir", str(work / output), "--resume_from_checkpoint", "true", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "popsd_integrations.cli", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_a_killed_run_resumes_to_the_same_weights(work, use_peft):
    from safetensors.torch import load_file

    unbroken = command(work, "whole", "--use_peft", use_peft)
    assert unbroken.wait(timeout=300) == 0, unbroken.stderr.read()
    killed = command(work, "killed", "--use_peft", use_peft)
    while not (work / "killed" / "checkpoint-4").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    name = "adapter_model.safetensors" if use_peft == "true" else "model.safetensors"
    assert not (work / "killed" / name).exists()
    resumed = command(work, "killed", "--use_peft", use_peft)
    assert resumed.wait(timeout=300) == 0, resumed.stderr.read()
    expected, found = (load_file(work / folder / name) for folder in ("whole", "killed"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_wrong_hint_comes_from_a_column_and_joins_the_dry_run(work, capsys):
    rows = [json.loads(line) | {"miss": "7 7"} for line in (work / "data" / "train.jsonl").read_text().splitlines()]
    (work / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--loss_target", "contrastive_hints", "--wrong_solution_column", "miss", "--masks", '{"floor": 0.5}']
    assert cli.main(["train", "--config", str(work / "config.yaml"), *flags, "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert (
        "reference-only teacher: the question and the wrong hint: 9 tokens" in printed and "Q 0 0 R 7 7 OK A" in printed
    )
    assert cli.main(["train", "--config", str(work / "config.yaml"), *flags, "--max_steps", "1"]) == 0
    options = torch.load(work / "out" / "training_args.bin", weights_only=False)
    assert (options.pmi_clip, options.masks) == (None, {"floor": 0.5})


def test_answers_come_from_a_column_and_the_end_says_how_to_go_on(work, capsys):
    rows = (work / "data" / "train.jsonl").read_text()
    (work / "data" / "test.jsonl").write_text(rows)
    flags = ["--eval_strategy", "steps", "--eval_steps", "2", "--answer_column", "answer", "--eval_problems", "3"]
    assert cli.main(["train", "--config", str(work / "config.yaml"), *flags]) == 2
    assert "answer_column: expected none without eval_scorer; got 'answer'" in capsys.readouterr().err
    flags += ["--eval_scorer", "popsd_integrations.miniature.task:verdict", "--save_strategy", "no"]
    assert cli.main(["train", "--config", str(work / "config.yaml"), *flags]) == 0
    saved, load, evaluate = capsys.readouterr().out.splitlines()[-3:]
    assert saved.startswith(
        f"Saved: the adapter in {work}/out; metrics.jsonl, popsd_config.json, eval_completions.jsonl"
    )
    assert load.startswith(f"Load: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{work}/model')")
    assert evaluate.startswith(
        f"Evaluate: popsd evaluate --model_name_or_path {work}/model --adapters {work}/out --eval_scorer popsd_int"
    )
    records = [json.loads(line) for line in (work / "out" / "eval_completions.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 3 and "WAIT" in records[0]["expected"]


def test_a_file_is_data_and_its_named_column_takes_the_place_of_another(work, capsys):
    rows = [
        {"prompt": "7", "privileged_context": "7", "problem": f"{a} 1", "answer": f"{a} WAIT\u001b[31m\u202e"}
        for a in range(4)
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config", str(work / "config.yaml"), "--dataset_name", str(work / "rows.jsonl"), "--dry_run", "true"]
    assert cli.main(["train", *flags, "--bf16", "true", "--use_cpu", "false"]) == 0, "nothing is computed in bf16"
    assert "\nQ 0 1 A\n" in capsys.readouterr().out
    assert _printable("a\n\u001b[31m\u202eé") == "a\n\\x1b[31m\\u202eé"
    for text, message in (("", "an empty file"), ("\n", "no row"), ('{"a": 1\n{"', "JSON parse error")):
        (work / "rows.jsonl").write_text(text)
        assert cli.main(["train", *flags]) == 2
        printed = capsys.readouterr().err
        assert message in printed and "dataset_name: expected a name" in printed


def test_broken_files_of_a_model_are_named(work, capsys):
    flags = ["train", "--config", str(work / "config.yaml")]
    (work / "model" / "model.safetensors").write_bytes(b"junk")
    assert cli.main(flags) == 2
    assert "model_name_or_path: expected a name on the Hub or a local folder of a model" in capsys.readouterr().err
    for path in (work / "model").glob("token*"):
        path.unlink()
    assert cli.main([*flags, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert "popsd train: " in said and ("has no tokens for text" in said or "model_name_or_path: expected" in said)


def test_an_interrupt_says_what_the_same_command_does(work, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "main", interrupted)
    assert cli.main(["train", "--config", str(work / "config.yaml")]) == 130
    assert "the same command resumes" in capsys.readouterr().err
