"""The demo's base, OPSD and purified model, saved as folders: ``popsd evaluate`` finds the accuracies that the demo found."""

import json
import time

import pytest
import torch
from evaluate_files import SCORER, save_model, save_puzzles

from popsd_integrations.cli import main
from popsd_integrations.miniature.experiment import ExperimentConfig, run_experiment
from popsd_integrations.miniature.task import MAX_NEW_TOKENS
from popsd_integrations.miniature.warmup import warm_up

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
PUZZLES = 384


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's results, and folders with its three models."""
    folder, cache = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("cache")
    config = ExperimentConfig(test_puzzles=PUZZLES)
    results = run_experiment(config, folder / "runs", cache, progress=False)
    save_model(folder / "base", warm_up(config.warmup, cache))
    for target in ("opsd", "purified"):
        save_model(folder / target, trained(config, cache, folder / "runs" / f"{target}-seed0"))
    return results, folder


def trained(config, cache, run):
    model = warm_up(config.warmup, cache)
    parameters = torch.load(run / "checkpoint.pt", weights_only=False)["parameters"]
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied to the embedding
    return model.eval()


def test_accuracies_are_those_of_the_demo(demo, tmp_path):
    results, folder = demo
    save_puzzles(tmp_path / "puzzles.jsonl", PUZZLES)
    models = [str(folder / name) for name in ("opsd", "purified")]
    options = ["--temperature", "1", "--top_p", "1", "--top_k", "0", "--max_completion_length", str(MAX_NEW_TOKENS)]
    options += [
        "--question_template",
        "Q {question} A",
        "--num_generations",
        "4",
        "--per_device_eval_batch_size",
        "512",
        "--eval_scorer",
        SCORER,
    ]
    began = time.process_time()
    inputs = [
        "--model_name_or_path",
        str(folder / "base"),
        "--adapters",
        *models,
        "--benchmarks",
        str(tmp_path / "puzzles.jsonl"),
    ]
    assert main(["evaluate", *inputs, *options, "--output_dir", str(tmp_path / "out")]) == 0
    assert time.process_time() - began < 60
    found = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    for name, label in (("base", "base"), ("opsd", models[0]), ("purified", models[1])):
        accuracy = found[label]["puzzles"]["accuracy"]
        # the demo's own number is of one sample per puzzle, and has a standard error of its own
        assert accuracy["low"] - 2 * results["standard_error"] <= results[name]["accuracy"]
        assert results[name]["accuracy"] <= accuracy["high"] + 2 * results["standard_error"]
        markers = found[label]["puzzles"]["markers"]["whole words"]["per_completion"]
        assert markers == pytest.approx(results[name]["markers"], rel=0.1)
    collapse = found[models[0]]["puzzles"]["difference"]["accuracy"]
    assert collapse["high"] < -0.08  # what the demo shows: standard OPSD collapses
