"""The recipe of examples/reproduce: its files are one setting with the other examples, and its chain runs."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from popsd_integrations import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPE = EXAMPLES / "reproduce"
SETTINGS = ("opsd", "paper")
SIZES = {"model_name_or_path", "prompt_column", "solution_column", "output_dir", "gradient_accumulation_steps"}


def options(path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    spec = importlib.util.spec_from_file_location("tiny", RECIPE / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(folder)
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_dry_run_writes_the_prompts_of_the_recipe(setting, tiny, tmp_path, capsys):
    flags = ["--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data", "--output_dir", tmp_path]
    flags += ["--vocab_size", "261", "--dry_run", "true"]
    flags += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    assert cli.main(["train", "--config", str(RECIPE / f"{setting}.yaml"), *map(str, flags)]) == 0
    student, teacher, reference = capsys.readouterr().out.split("=== memory")[0].split("tokens, thinking ")[1:]
    assert student.startswith("closed") and teacher.startswith("none") and reference.startswith("none")
    begin, solution, end = (teacher.index(x) for x in ("solution begins -----\n", "It is 4.", "\n----- solution ends"))
    assert begin < solution < end and "What is 2 + 2?" in teacher[:begin]
    assert "It is 4." in reference and "What is 2 + 2?" not in reference and "It is 4." not in student
    assert all(
        "the final answer within \\boxed{} at the end.<|im_end|>" in prompt for prompt in (student, teacher, reference)
    )


def test_the_examples_are_one_recipe():
    """They differ in model, data, split of the 32 completions, and where the two settings do."""
    opsd, paper = (options(RECIPE / f"{setting}.yaml") for setting in SETTINGS)
    own = {
        "dataset_name",
        "loss_target",
        "beta",
        "entry_clip",
        "max_steps",
        "save_steps",
        "model_name_or_path",
        "output_dir",
    }
    assert {name for name in opsd.keys() | paper.keys() if opsd.get(name) != paper.get(name)} == own
    wanted = {"beta": 0.0, "entry_clip": 0.05, "max_grad_norm": 0.1, "temperature": 1.1, "top_p": 0.95, "top_k": 20}
    wanted |= {"lora_r": 64, "lora_alpha": 128, "learning_rate": 5e-6, "max_steps": 100, "save_steps": 25}
    assert wanted.items() <= opsd.items() and opsd["max_prompt_length"] + opsd["max_completion_length"] == 20_000
    for path in EXAMPLES.glob("*.yaml"):
        example = options(path)
        assert {name for name in example if example[name] != paper.get(name, example[name])} <= SIZES, path
        assert {name for name in paper if name not in example} == {
            "question_template",
            "teacher_template",
            "reference_template",
        }, path


@pytest.mark.parametrize("name", ["qwen3_lora.yaml", "qwen3_lora_8gpu.yaml"])
def test_the_lines_for_held_out_accuracy_work_once_they_are_taken(name, tiny, tmp_path, capsys):
    text = (EXAMPLES / name).read_text()
    assert text.count("\n#") - text.count("\n# ") == 8
    config, data = tmp_path / "train.yaml", tmp_path / "data"
    config.write_text(re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE))
    data.mkdir()
    row = json.dumps({"prompt": "What is 2 + 2?", "solution": "It is 4.", "answer": "4"}) + "\n"
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(32 * row)
    flags = {"model_name_or_path": tiny / "model", "dataset_name": data, "output_dir": tmp_path, "vocab_size": 261}
    flags |= {"dry_run": True, "max_completion_length": 64, "eval_max_completion_length": 128}
    given = [text for option, value in flags.items() for text in (f"--{option}", str(value))]
    assert cli.main(["train", "--config", str(config), *given]) == 0
    assert "eval_dataset: of 32 problems 0 are dropped" in capsys.readouterr().out


def run(*arguments, **variables):
    paths = [str(ROOT / name) for name in ("", "kernels", "integrations", "benchmarks")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **variables}
    command = ["bash", str(RECIPE / "reproduce.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage: reproduce.sh"),
        (["--dry", "opds"], {}, "setting: expected opsd or paper; got 'opds'"),
        (["opsd"], {"GPUS": "3"}, "GPUS: expected 1, 2, 4 or 8; got '3'"),
    ],
)
def test_the_script_parses_and_refuses_what_it_does_not_know(arguments, variables, message):
    subprocess.run(["bash", "-n", str(RECIPE / "reproduce.sh")], check=True)
    ended = run(*arguments, **variables)
    assert ended.returncode != 0 and message in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_whole_chain_runs_and_runs_again(setting, tmp_path):
    runs = tmp_path / "runs"
    ended = run("--dry", setting, RUNS=str(runs))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "train_dataset: of 6 problems 0 are dropped" in ended.stdout
    results = json.loads((runs / "evaluation" / "results.json").read_text())
    steps = [f"{target}/checkpoint-{step}" for target in ("opsd", "purified") for step in (1, 2)]
    assert list(results["models"]) == ["base", *steps]
    assert (runs / "compare" / "compare.html").exists()
    for target in ("opsd", "purified"):
        kept = json.loads((runs / target / "popsd_run.json").read_text())
        assert target in json.dumps(kept)
    generations = (runs / "evaluation" / "generations.jsonl").read_text()
    trained = (runs / "opsd" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run("--dry", setting, RUNS=str(runs)).returncode == 0
    assert (runs / "evaluation" / "generations.jsonl").read_text() == generations
    assert (runs / "opsd" / "adapter_model.safetensors").stat().st_mtime_ns == trained
