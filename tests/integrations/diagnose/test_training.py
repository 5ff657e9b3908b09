"""``popsd diagnose --config train.yaml``: what is measured is what ``popsd train`` makes of the same file."""

import contextlib
import json

import pytest
import torch

pytest.importorskip("trl")

import yaml
from trl_helpers import PROBLEMS, files

import popsd
from popsd_integrations import cli
from popsd_integrations.diagnose import training
from popsd_integrations.diagnose.measure import diagnose
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.trl_trainer import command as train_command
from popsd_integrations.trl_trainer.dataset import problem_of, with_other_solutions


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a model and data, and the options that name them."""
    folder = tmp_path_factory.mktemp("run")
    return folder, files(folder, "data.jsonl")


@pytest.fixture
def folder(shared):
    return shared[0]


@pytest.fixture
def config(shared, tmp_path):
    """Writes train.yaml with further options; returns its path."""

    def write(**options):
        own = {"output_dir": str(tmp_path / "out"), "markers": ["wait", "maybe", "check"], "seed": 3}
        common = shared[1] | own
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(common | options))
        return str(path)

    return write


def read(path, *flags, completions=8):
    return training.read(["--config", path, *flags], completions, None)


def test_prompts_target_and_sampling_are_those_of_training(config, tmp_path, monkeypatch):
    """Against the arguments that the trainer is built with."""
    flags = ["--chat_template_kwargs", '{"enable_thinking": false}', "--top_k", "3", "--temperature", "0.7"]
    options = {"teacher_chat_template_kwargs": {"enable_thinking": True}, "loss_target": "beta_opsd", "pmi_beta": 2.0}
    options |= {"vocab_size": 20, "dtype": "bfloat16", "entry_clip": 0.1, "masks": {"min_target_entropy": 0.2}}
    path = config(**options, skip_first_tokens=1)
    seen = {}

    class Trainer:
        def __init__(self, **given):
            seen.update(given)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(train_command, "PurifiedOPSDTrainer", Trainer)
        train_command.main(["--config", path, *flags, "--use_cpu", "true"])
    args, setting = seen["args"], read(path, *flags)
    loss = args.loss_function(setting.tokenizer)
    assert (setting.config.loss, setting.config.masks) == (loss.config, loss.masks)
    assert setting.config.loss.vocab_size == 20 and setting.config.loss.temperature == 0.7
    assert (setting.config.loss_target, setting.config.max_new_tokens, setting.config.batch_size) == ("beta_opsd", 5, 4)
    assert setting.model.dtype == torch.bfloat16 and setting.folder == tmp_path / "out" / "diagnose"
    written = {tuple(build_tokenizer().decode(ids) for ids in row) for row in setting.prompts}
    hint = f"R {PROBLEMS[5]['answer']} OK A A CHECK"  # the template's A, the chat template's, and what enable_thinking adds
    assert (f"Q {PROBLEMS[5]['problem']} A", f"Q {PROBLEMS[5]['problem']} {hint}", f"Q {hint}") in written and len(
        written
    ) == 8
    assert setting.generate.keywords == {"top_p": 1.0, "top_k": 3, "repetition_penalty": 1.0}
    counted = setting.token_weights(torch.ones(1, 3, dtype=torch.bool))
    assert counted.tolist() == [[False, True, True]]
    found = diagnose(*setting[:4], generate=setting.generate, token_weights=setting.token_weights, progress=False)
    assert all(row["weight"] == 0 for row in found.tokens if row["position"] == 0)
    assert max(row["token"] for row in found.tokens) < 20 and found.config["loss"]["pmi_beta"] == 2.0


def test_defaults_are_those_of_training(config, folder):
    import argparse

    from popsd_integrations.diagnose.command import add_arguments

    own = argparse.ArgumentParser()
    add_arguments(own)
    trained = {option for action in _options_of_train() for option in action.option_strings}
    names = {option for action in own._actions for option in action.option_strings} - {"-h", "--help"}
    assert not names & trained, "a name means one thing"
    _, args, *_ = train_command.read_options(["--config", config(), "--use_cpu", "true"])
    found = read(config()).config
    assert found.temperature == args.temperature == 1.0 and found.seed == 3 and found.autocast is None
    _, args, *_ = train_command.read_options(["--config", config(bf16=True)], trains=False)
    assert training._config(args, build_tokenizer(), 8).autocast == torch.bfloat16


def _options_of_train():
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    parts = (train_command.TrainArguments, train_command.PurifiedOPSDConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(parts)._actions


def test_rows_are_random_and_the_seed_decides(config):
    def drawn(*flags):
        return [row.question for row in read(config(), *flags, completions=3).prompts]

    first = drawn()
    assert first == drawn() != drawn("--seed", "4") and len(first) == 3
    ordered = [[VOCABULARY.index(x) for x in f"Q {row['problem']} A".split()] for row in PROBLEMS]
    assert first != ordered[:3] and all(row in ordered for row in first)


def test_controls_are_measured_as_they_are_trained(config):
    """The trainer draws the other problem's solution by the same seed, from all rows."""
    path = config(reference="other_problem")
    script, args, _, mixture = train_command.read_options(["--config", path], trains=False)
    rows = with_other_solutions(train_command.load_data(script, mixture, args.seed)["train"], "train_dataset", args)
    setting = read(path)
    builder = ContextBuilder(setting.tokenizer, args.context_config(), text_as_chat=False)
    assert sorted(setting.prompts) == sorted(builder.build_all([problem_of(row) for row in rows]))


def test_rows_that_training_drops_are_passed_over_and_counted(config, folder, tmp_path):
    rows = [{"problem": "1 2", "answer": "3 " * (40 if n % 2 else 1)} for n in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = {"dataset_name": str(tmp_path / "long.jsonl"), "max_prompt_length": 20}
    setting = read(config(**long, on_overflow="drop"))
    assert len(setting.prompts) == 4 and "4 more were dropped as too long" in setting.about["Data"]
    with pytest.raises(
        ValueError, match=r"train_dataset, row \d: max_prompt_length: expected prompts of at most 20 tokens"
    ):
        read(config(**long))
    streamed = ["--dataset_streaming", "true", "--on_overflow", "drop"]
    assert len(read(config(**long), *streamed, completions=2).prompts) == 2


def test_the_command(config, tmp_path, capsys):
    """A registered target, bfloat16 by mixed precision, and everything that the page has to say."""
    name = "test_diagnose_halfway"
    if name not in popsd.engine.chunks.registry.known_targets():
        popsd.register_target(name, lambda b, t, r: (b + t) / 2, contexts=("base", "teacher"))
    path = config(bf16=True)
    assert cli.main(["diagnose", "--config", path, "--diagnose_problems", "6", "--loss_target", name]) == 0
    printed = capsys.readouterr().out
    assert name in printed and "cannot tell" in printed
    content = json.loads((tmp_path / "out" / "diagnose" / "diagnosis.json").read_text())
    assert content["config"]["loss"]["target"] == name and content["means"]["tokens"][0] <= 30
    page = (tmp_path / "out" / "diagnose" / "report.html").read_text(encoding="utf-8")
    for said in (
        f"loss_target {name}",
        "data.jsonl",
        "6 rows drawn with seed 3",
        "model, torch.float32 weights, torch.bfloat16",
    ):
        assert said in page, said
    assert "Command" in page and "Date" in page and "R 0 WAIT" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompt_column", "question"],
            "prompt_column: expected one of the columns ['problem', 'answer'] of the split",
        ),
        (["--markers", "zebra"], "markers: expected a marker that this tokenizer can write; got ['zebra']"),
        (
            ["--model_name_or_path", "/nowhere"],
            "there is no folder '/nowhere'",
        ),
        (["--cache_dir", "x"], "cache_dir: expected none with a model to measure"),
        (["--loss_target", "nothing"], "loss_target: expected one of"),
    ],
)
def test_bad_input_is_named(config, capsys, flags, message):
    assert cli.main(["diagnose", "--config", config(), *flags]) == 2
    assert message in capsys.readouterr().err


def test_options_without_a_model_are_refused(capsys):
    assert cli.main(["diagnose", "--pmi_beta", "2"]) == 2
    assert "model_name_or_path: expected a model; got none" in capsys.readouterr().err


def test_a_poisoned_row_is_named_before_the_weights_are_loaded(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "create_model_from_path", lambda *_, **__: pytest.fail("the weights were loaded"))
    for text, message in ((None, "question"), ("EOS", "control tokens; got 'EOS'")):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": text, "answer": "1"}) + "\n")
        assert cli.main(["diagnose", "--config", config(dataset_name=str(tmp_path / "rows.jsonl"))]) == 2
        printed = capsys.readouterr().err
        assert "train_dataset, row 0: " in printed and message in printed


def test_code_of_a_checkpoint_is_not_run(folder, config, tmp_path, capsys, monkeypatch):
    """Nor is it asked for on the terminal, which is what transformers does where nobody said no."""
    import shutil

    shutil.copytree(folder / "model", tmp_path / "evil")
    content = json.loads((tmp_path / "evil" / "config.json").read_text(encoding="utf-8"))
    content |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert cli.main(["diagnose", "--config", config(model_name_or_path=str(tmp_path / "evil"))]) == 2
    assert "trust_remote_code" in capsys.readouterr().err and not (tmp_path / "ran").exists()
