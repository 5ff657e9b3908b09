"""The vLLM engine, on a CPU too. It runs where vLLM is installed, in an environment of its own: docs/evaluation.md."""

import json

import pytest
from evaluate_files import OPTIONS, save_adapter, save_model, save_puzzles

from popsd_integrations.cli import main

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    base = save_model(folder / "base", wide=True)
    save_adapter(folder / "run" / "checkpoint-1", base, seed=1, r=8)
    save_adapter(folder / "run" / "checkpoint-2", base, seed=2, r=8)
    save_puzzles(folder / "a.jsonl", 3)
    return folder


def evaluate(files, output, *more):
    inputs = ["--model_name_or_path", files / "base", "--adapters", files / "run", "--benchmarks", files / "a.jsonl"]
    assert main(["evaluate", *map(str, inputs), "--output_dir", str(output), *OPTIONS, *more]) == 0
    return [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]


def test_twelve_samples_of_the_base_and_two_adapters(files, tmp_path):
    """As many as asked for, by the weights asked for: greedily, vLLM and transformers say the same."""
    small = {"enforce_eager": True, "dtype": "float32", "max_num_seqs": 16, "gpu_memory_utilization": 0.1}
    vllm = ["--use_vllm", "--model_init_kwargs", json.dumps(small)]
    rows = evaluate(files, tmp_path / "sampled", "--num_generations", "12", "--per_device_eval_batch_size", "18", *vllm)
    assert len(rows) == 3 * 3 * 12
    for label in {row["model"] for row in rows}:
        for problem in range(3):
            texts = [row["text"] for row in rows if (row["model"], row["problem"]) == (label, problem)]
            assert len(texts) == 12 and len(set(texts)) > 6, "samples of one request differ"
    assert all(row["tokens"] <= 12 and row["finish"] in ("stop", "length") for row in rows)
    assert any(row["finish"] == "stop" for row in rows)
    greedy = ["--temperature", "0"]
    ours = evaluate(files, tmp_path / "transformers", *greedy, "--model_init_kwargs", '{"dtype": "float32"}')
    theirs = evaluate(files, tmp_path / "greedy", *greedy, *vllm)
    assert [(row["model"], row["text"]) for row in theirs] == [(row["model"], row["text"]) for row in ours]
    assert len({row["text"] for row in ours if row["problem"] == 0}) == 3, "three models, three completions"
