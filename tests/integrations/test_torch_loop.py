import json
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from loop_helpers import CONFIG, PROMPTS, deterministic, fixed_generate, no_work, run, tiny

import popsd
from popsd_integrations.huggingface.frozen import frozen_weights
from popsd_integrations.huggingface.heads import head_from_model, hidden_states
from popsd_integrations.huggingface.prompts import Problem, Prompts
from popsd_integrations.huggingface.sampling import hf_generate
from popsd_integrations.torch_loop import TrainConfig, loop

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("target", ["purified", "opsd"])
def test_first_loss_is_the_oracles(tmp_path, target, lora_rank):
    """At step 1 student and base are the same, and every distribution can be had from the model's own logits."""
    config = replace(
        CONFIG, steps=1, batch_size=len(PROMPTS), loss_target=target, lora_rank=lora_rank, micro_batch_size=3
    )
    row = run(tmp_path, config, generate=fixed_generate).metrics[0]
    model, losses, cosines = tiny(), [], []
    for prompt in PROMPTS:
        completion = fixed_generate(None, [prompt.question])[0]
        logits = {}
        for name in Prompts._fields:
            context = getattr(prompt, name)
            with torch.no_grad():
                full = model(input_ids=torch.tensor([context + completion])).logits[0]
            logits[name] = full[len(context) - 1 : -1]
        student, teacher, reference = logits.values()
        if target == "purified":
            losses.append(popsd.oracle.purified_jsd(student, student, teacher, reference, config.loss))
        else:
            losses.append(popsd.oracle.jsd(student, teacher, config.loss))
        cosines.append(popsd.oracle.decompose(student, teacher, reference, config.loss).cos_total_reference)
    assert row["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert row["decomposition/cos_total_reference"] == pytest.approx(torch.cat(cosines).mean().item(), abs=1e-4)
    assert row["loss"] > 0.01


def test_metrics_of_a_run(tmp_path):
    result = run(
        tmp_path, replace(CONFIG, evaluate_every=4), evaluate=lambda model: {"weight": model.lm_head.weight.sum()}
    )
    assert [row["step"] for row in result.metrics] == list(range(1, 7))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert [row["step"] for row in lines if "decomposition/total_norm" in row] == [1, 3, 5]
    assert [row["step"] for row in lines if "eval/weight" in row] == [4, 6]
    for name in ("loss", "student_entropy", "target_entropy", "grad_norm", "completions/mean_length"):
        assert all(0 < row[name] < 100 for row in lines)
    assert {"markers/per_completion", "markers/wait", "completions/eos_rate", "seconds/generate"} <= lines[0].keys()
    assert all(row["forwards/tokens_per_second"] > 0 and 0 <= row["forwards/padding_share"] < 1 for row in lines)


def test_progress_shows_eight_figures_a_step_of_all_that_is_logged(tmp_path, capsys):
    config = replace(CONFIG, steps=2, evaluate_every=2, masks=popsd.MaskConfig(floor=0.1))
    run(tmp_path, config, evaluate=lambda model: {"mine": 0.25}, progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    names = [[part.rsplit(" ", 1)[0] for part in line.split("  ")] for line in lines]
    assert names[0] == ["step", "loss", "kl_base", "kept", "length", "markers", "grad_norm", "s/step"]
    assert names[1:] == [[name for name in names[0] if name != "kl_base"], ["step", "eval/mine"]]
    assert "eval/mine 0.25" in lines[2]


@pytest.mark.parametrize("target", ["purified", "opsd"])
def test_training_reaches_the_target(tmp_path, target):
    config = replace(CONFIG, steps=30, batch_size=10, loss_target=target)
    metrics = run(tmp_path, config, generate=fixed_generate).metrics
    assert metrics[-1]["loss"] < 0.3 * metrics[0]["loss"]


def test_metrics_do_not_depend_on_the_micro_batch_or_on_batched_frozen_passes(tmp_path):
    whole = run(tmp_path / "whole").metrics
    for name, options in {
        "1": {"micro_batch_size": 1},
        "3": {"micro_batch_size": 3, "padding_free": True},
        "b": {"batched_frozen": True},
    }.items():
        split = run(tmp_path / name, replace(CONFIG, **options)).metrics
        assert (split[0]["forwards/padding_share"] == 0) == (name == "1")
        for row, other in zip(deterministic(whole), deterministic(split), strict=True):
            assert row == pytest.approx(other, rel=2e-3, abs=1e-5)


def test_evaluation_does_not_disturb_the_run(tmp_path):
    plain = run(tmp_path / "plain").metrics
    drawn = run(
        tmp_path / "drawn",
        replace(CONFIG, evaluate_every=1),
        evaluate=lambda model: {"x": random.random() + torch.rand(())},
    )
    assert [row["loss"] for row in plain] == [row["loss"] for row in drawn.metrics]


def test_lora_trains_the_adapter_alone(tmp_path):
    model = tiny()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = run(tmp_path, replace(CONFIG, lora_rank=4), model=model)
    trained = {name: parameter for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert max(parameter.abs().max() for name, parameter in trained.items() if "lora_B" in name) > 1e-3
    with result.model.disable_adapter():
        ids = torch.tensor([[11, 3, 13]])
        torch.testing.assert_close(hidden_states(result.model, ids), hidden_states(tiny(), ids))
    assert torch.equal(head_from_model(result.model).weight, before["model.embed_tokens.weight"])


def test_rows_visit_every_problem_once_an_epoch(tmp_path):
    seen = []

    def generate(model, prompts, **options):
        seen.extend(tuple(prompt) for prompt in prompts)
        return fixed_generate(model, prompts)

    prompts = [Prompts([11, a, 13], [11, a, 13], [13]) for a in range(6)]
    run(tmp_path, replace(CONFIG, steps=6, batch_size=2), prompts=prompts, generate=generate)
    assert len(set(seen[:6])) == len(set(seen[6:])) == 6
    assert seen[:6] != seen[6:]


class Broken(Exception):
    pass


def breaks_at(call):
    calls = iter(range(1, 100))

    def generate(model, prompts, **options):
        if next(calls) == call:
            raise Broken
        return hf_generate(model, prompts, **options)

    return generate


@pytest.mark.parametrize("lora_rank", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_a_broken_run_resumes_to_the_same_metrics_and_weights(tmp_path, lora_rank):
    config = replace(CONFIG, lora_rank=lora_rank)
    unbroken = run(tmp_path / "unbroken", config)
    with pytest.raises(Broken):
        run(tmp_path / "broken", config, generate=breaks_at(4))
    with pytest.raises(Broken):
        run(tmp_path / "broken", config, generate=breaks_at(2), resume=True)
    torch.manual_seed(123)  # whatever state the next process is in
    resumed = run(tmp_path / "broken", config, resume=True)
    assert deterministic(resumed.metrics) == deterministic(unbroken.metrics)
    for one, other in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_can_be_extended(tmp_path):
    unbroken = run(tmp_path / "unbroken")
    run(tmp_path / "extended", replace(CONFIG, steps=3))
    extended = run(tmp_path / "extended", CONFIG, resume=True)
    assert deterministic(extended.metrics) == deterministic(unbroken.metrics)


def test_fewer_steps_than_the_checkpoint_has_taken_are_refused(tmp_path):
    run(tmp_path, replace(CONFIG, steps=4))
    with pytest.raises(
        ValueError, match=r"steps: expected at least the 4 that the checkpoint in .*; got 3\. Raise steps"
    ):
        run(tmp_path, replace(CONFIG, steps=3), resume=True, generate=no_work)
    assert len(run(tmp_path, replace(CONFIG, steps=4), resume=True, generate=no_work).metrics) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, learning_rate=1e-3)}, r"differs in learning_rate\. Restore"),
        ({"config": replace(CONFIG, loss=popsd.PurifiedConfig(pmi_beta=2.0))}, r"differs in loss\."),
        ({"model": tiny(seed=1)}, r"differs in initial weights\."),
        ({"prompts": PROMPTS[:-1]}, r"differs in prompts\."),
        ({"model": tiny(rms_norm_eps=1e-3)}, r"differs in model\.config\.rms_norm_eps\."),
    ],
)
def test_a_foreign_checkpoint_is_refused_before_any_work(tmp_path, change, message):
    run(tmp_path, replace(CONFIG, steps=2))
    content = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"output_dir: expected a checkpoint of this very run.*{message}"):
        run(tmp_path, **{"config": CONFIG, **change}, resume=True, generate=no_work)
    assert content == ((tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes())


def test_an_existing_run_is_not_overwritten(tmp_path):
    run(tmp_path, replace(CONFIG, steps=2))
    with pytest.raises(ValueError, match=r"output_dir: expected no checkpoint.*Pass resume=True"):
        run(tmp_path, generate=no_work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps: expected a number of at least 1; got 0"),
        ({"micro_batch_size": 0}, r"micro_batch_size: "),
        ({"steps": 2.5}, r"steps: expected a whole number; got 2\.5"),
        ({"micro_batch_size": 1.5}, r"micro_batch_size: expected a whole number or None; got 1\.5"),
        ({"learning_rate": "5e-6"}, r"learning_rate: expected a number; got '5e-6'"),
        ({"temperature": None}, r"temperature: expected a number; got None"),
        ({"weight_decay": float("nan")}, r"weight_decay: expected a number of at least 0; got nan"),
        ({"temperature": -1.0}, r"temperature: expected a number of at least 0"),
        ({"learning_rate": float("nan")}, r"learning_rate: expected a positive finite number"),
        ({"loss_target": "teacher"}, r"loss_target: expected one of .*'opsd'.*; got 'teacher'"),
        ({"adam_betas": (0.9, 1.0)}, r"adam_betas: expected two numbers in \[0, 1\)"),
    ],
)
def test_bad_config_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    "prompts", [[Problem("1 + 1", "2")], [{"question": [1]}], Dataset.from_list([{"a": 1}]), iter(PROMPTS)]
)
def test_what_is_no_prompts_is_refused(tmp_path, prompts):
    with pytest.raises(
        TypeError, match=r"prompts: expected a list of Prompts; got .*ContextBuilder\(tokenizer\)\.build_all"
    ):
        run(tmp_path, prompts=prompts, generate=no_work)


def test_no_prompts_and_two_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"prompts: expected at least one problem.*build_all"):
        run(tmp_path, prompts=[])
    adapted = run(tmp_path / "a", replace(CONFIG, steps=1, lora_rank=4)).model
    with pytest.raises(ValueError, match=r"lora_rank: expected None for a model that has an adapter"):
        run(tmp_path / "b", replace(CONFIG, lora_rank=4), model=adapted, generate=no_work)
    with pytest.raises(ValueError, match=r"frozen: expected .* a divergence of 0; got .*trained already\. Merge it"):
        run(tmp_path / "c", replace(CONFIG, steps=1), model=adapted, generate=no_work)
    merged = run(tmp_path / "d", replace(CONFIG, steps=1), model=adapted.merge_and_unload().requires_grad_(True))
    assert merged.metrics[0]["loss"] > 0


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_frozen_weights_that_move_stop_the_run_before_its_checkpoint(tmp_path, monkeypatch, lora_rank):
    sources = []
    monkeypatch.setattr(loop, "frozen_weights", lambda model: sources.append(frozen_weights(model)) or sources[-1])

    def generate(model, prompts, **options):
        with sources[0].weights() as frozen, torch.no_grad():
            name = "q_proj.base_layer.weight" if lora_rank else "q_proj.weight"
            next(p for key, p in frozen.named_parameters() if key.endswith(name))[0, 0] += 1e-3
        return fixed_generate(model, prompts)

    with pytest.raises(RuntimeError, match=r"frozen weights: expected those of the start; 1 of \d+ .*q_proj"):
        run(tmp_path, replace(CONFIG, lora_rank=lora_rank), generate=generate)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == CONFIG.checkpoint_every


def test_padding_goes_where_the_model_does_not_see_it(tmp_path, monkeypatch):
    sides, real = [], loop.pack_contexts
    monkeypatch.setattr(loop, "check_model", lambda *arguments, **options: "right")
    monkeypatch.setattr(
        loop, "pack_contexts", lambda *a, **options: sides.append(options["side"]) or real(*a, **options)
    )
    result = run(tmp_path, replace(CONFIG, steps=1, batched_frozen=True), generate=fixed_generate)
    assert sides == ["right"]
    monkeypatch.undo()
    left = run(tmp_path / "left", replace(CONFIG, steps=1), generate=fixed_generate)
    assert result.metrics[0]["loss"] == pytest.approx(left.metrics[0]["loss"], rel=1e-5)
