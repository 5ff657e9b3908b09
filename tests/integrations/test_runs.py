"""What a run leaves in its folder, held-out accuracy among it. Here by the plain loop; the trainer's tests are its own."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from loop_helpers import CONFIG, EOS, PROMPTS, deterministic, no_work, run, tiny

from popsd_integrations.cli import main
from popsd_integrations.huggingface.sampling import hf_generate, own_randomness
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.runs import held_out, report
from popsd_integrations.torch_loop import HeldOut

ANS = VOCABULARY.index("ANS")
SCORER = "popsd_integrations.miniature.task:verdict"
HELD = HeldOut(prompts=PROMPTS, answers=[f"{a} 3" for a in range(5) for _ in range(2)], scorer=SCORER, problems=6)


def answering(model, prompts, *, temperature, **options):
    """Greedily all answers are right and end; sampled those of even digits are, and none ends."""
    wrong = temperature > 0
    return [
        [ANS, prompt[1], 3 if prompt[1] % 2 == 0 or not wrong else 4, *([] if wrong else [EOS])] for prompt in prompts
    ]


def test_verdicts_are_the_scorers_and_completions_are_logged(tmp_path):
    config = replace(CONFIG, steps=4, evaluate_every=2)
    rows = run(tmp_path, config, generate=answering, held_out=HELD).metrics
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4]
    # the first six problems have the digits 0, 0, 1, 1, 2, 2
    assert (rows[1]["eval/accuracy"], rows[1]["eval/accuracy_greedy"]) == (4 / 6, 1.0)
    assert rows[1]["eval/truncated"] == 1.0
    records = held_out.read_lines(tmp_path / held_out.FILE)
    assert [(x["step"], x["kind"]) for x in records[::6]] == [(s, k) for s in (2, 4) for k in ("sampled", "greedy")]
    assert records[2]["question"] == build_tokenizer().decode(PROMPTS[2].question) and records[2]["expected"] == "1 3"
    assert (records[2]["text"], records[2]["correct"], records[2]["finish"]) == ("ANS 1 4", False, "length")
    assert (records[8]["text"], records[8]["correct"], records[8]["tokens"]) == ("ANS 1 3", True, 4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder, replace(CONFIG, evaluate_every=2, checkpoint_every=3), held_out=HELD)


def test_evaluation_changes_no_step(unbroken, tmp_path):
    plain = run(tmp_path)
    assert [row["loss"] for row in plain.metrics] == [row["loss"] for row in unbroken[1].metrics]
    for one, other in zip(plain.model.parameters(), unbroken[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_killed_run_ends_with_the_same_files(unbroken, tmp_path):
    """Killed in the sampling of step 6, behind the evaluation at step 4 that is newer than the checkpoint at step 3."""
    config, calls = replace(CONFIG, evaluate_every=2, checkpoint_every=3), iter(range(1, 100))

    def breaks(model, prompts, **options):
        if next(calls) == 6 + 2 * 2 * 2:
            raise KeyboardInterrupt
        return hf_generate(model, prompts, **options)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, held_out=HELD, generate=breaks)
    assert max(x["step"] for x in held_out.read_lines(tmp_path / held_out.FILE)) == 4
    with open(tmp_path / held_out.FILE, "a") as file:
        file.write('{"step": 4, "ki')
    resumed = run(tmp_path, config, held_out=HELD, resume=True)
    assert deterministic(resumed.metrics) == deterministic(unbroken[1].metrics)
    assert (tmp_path / held_out.FILE).read_text() == (unbroken[0] / held_out.FILE).read_text()


def test_page_options_and_model_are_in_the_folder(unbroken):
    from transformers import AutoModelForCausalLM

    folder, result = unbroken
    options = json.loads((folder / report.CONFIG).read_text())
    assert options["options"]["steps"] == 6 and options["options"]["loss"]["beta"] == 0.3
    assert {"popsd", "torch"} <= options["versions"].keys() and options["data"] == {"prompts": len(PROMPTS)}
    page = (folder / report.PAGE).read_text()
    assert page.count("<polyline") >= 6 and "accuracy, held-out, greedy" in page and page.count("<details>") == 6
    assert "http" not in page and "popsd evaluate --model_name_or_path" in page and "max_new_tokens" in page
    loaded = AutoModelForCausalLM.from_pretrained(folder / report.MODEL)
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name]), name


def test_three_lines_say_what_was_saved_and_how_to_go_on(tmp_path, capsys):
    from peft import PeftModel

    model = tiny()
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    options = {"model": model, "config": replace(CONFIG, steps=1, lora_rank=2)}
    run(tmp_path / "run", **options)
    assert capsys.readouterr().out == ""  # without progress nothing is printed
    saved, load, evaluate = report.how_to_go_on(tmp_path / "run")
    assert saved.startswith(
        f"Saved: the adapter in {tmp_path}/run/model; metrics.jsonl, popsd_config.json, report.html in"
    )
    from transformers import AutoModelForCausalLM

    names = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    loaded = eval(load.removeprefix("Load: "), names)
    assert sum("lora_" in name for name, _ in loaded.named_parameters()) > 0
    assert evaluate.startswith(
        f"Evaluate: popsd evaluate --model_name_or_path {tmp_path}/base --adapters {tmp_path}/run/model "
    )


def test_compare_reads_the_runs_of_the_loop(unbroken, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # drawing takes longer than all else here
    assert main(["compare", *(f"{x}={unbroken[0]}" for x in "ab"), "--output_dir", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "comparison.json").read_text())["tables"]
    rows = {row[0]: row[1:] for row in table}
    accuracy = unbroken[1].metrics[-1]["eval/accuracy_greedy"]
    assert rows["accuracy, held-out, greedy"] == [f"{accuracy:.4g}"] * 2 + ["+0.00"]
    assert rows["accuracy, held-out"][2] == rows["loss per token, nats"][2] == "+0.00"


BAD = {
    "nothing to evaluate": ({"config": replace(CONFIG, evaluate_every=2)}, "evaluate_every: expected 0 where nothing"),
    "an answer that is none": (
        {"held_out": replace(HELD, answers=["1 2", None] * 5)},
        r"answers\[1\]: answer: expected",
    ),
    "an unreadable answer": ({"held_out": replace(HELD, answers=["???"] * 10, scorer="math")}, "math-verify can parse"),
    "no such scorer": ({"held_out": replace(HELD, scorer="nowhere")}, "scorer: expected 'math'"),
    "too long": ({"held_out": replace(HELD, max_new_tokens=10**6)}, "prompts\\[0\\]: expected at most"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_work(case, tmp_path):
    if "unreadable" in case:
        pytest.importorskip("math_verify")
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, generate=no_work, **options)


def test_held_out_problems_need_answers_and_names_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="expected problems and an answer for each; got 10 prompts and 1 answers"):
        HeldOut(prompts=PROMPTS, answers=["1"])
    with pytest.raises(ValueError, match=r"held_out\.problems: expected at least 1, or None; got 0"):
        replace(HELD, problems=0)
    with pytest.raises(ValueError, match="expected other names than held_out's; got accuracy"):
        run(tmp_path, replace(CONFIG, steps=1), held_out=HELD, generate=answering, evaluate=lambda _: {"accuracy": 1.0})


def test_randomness_of_its_own_leaves_that_of_the_run():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    drawn = []
    for _ in range(2):
        with own_randomness(1):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and torch.equal(torch.rand(2), expected)


def test_secrets_are_not_written(tmp_path):
    options = {"hub_token": "abc", "max_tokens": 3, "model_init_kwargs": {"token": "def", "revision": "main"}}
    report.write_config(tmp_path, base="m", options=options, data={})
    text = (tmp_path / report.CONFIG).read_text()
    assert "abc" not in text and "def" not in text and '"max_tokens": 3' in text and '"revision": "main"' in text
