"""Several completions of each prompt: what is said of them, and that generation runs a prompt once and samples the same."""

import logging
import statistics

import pytest
import torch
from loop_helpers import CONFIG, PROMPTS, deterministic, fixed_generate, run, tiny

from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.groups import facts, prompts_run_once, within_prompts
from popsd_integrations.huggingface.sampling import exact_sharing, hf_generate
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.torch_loop import TrainConfig, loop

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

QUESTIONS = [[3, 4, 5, 6], [3, 4, 5, 6], [7, 8], [7, 8], [7, 8], [9, 1, 2]]
OPTIONS = {"max_new_tokens": 6, "eos_token_id": [VOCABULARY.index("EOS")], "pad_token_id": 10}


def small(**options):
    """Its numbers of input ids, in order, are in ``seen``."""
    model, seen = tiny(initializer_range=0.3, **options), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            kwargs["inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"].shape
        ),
        with_kwargs=True,
    )
    return model, seen


@pytest.mark.parametrize("adapter", [False, True])
def test_a_prompt_is_run_once_and_its_completions_are_the_same(adapter):
    model, seen = small()
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.eval()
    alone = [hf_generate(model, [ids], temperature=0.0, **OPTIONS)[0] for ids in QUESTIONS]
    seen.clear()
    assert hf_generate(model, QUESTIONS, temperature=0.0, **OPTIONS) == alone
    assert any(shape == (3, 3) for shape in seen), "three prompts, without their last tokens"
    assert not any(shape[0] == 6 and shape[1] > 1 for shape in seen), "no prompt again for each of its completions"
    assert "generate" not in vars(model) and "generate" not in vars(getattr(model, "base_model", model))


def test_samples_of_one_prompt_are_independent_and_of_its_distribution():
    model, _ = small()
    torch.manual_seed(0)
    found = hf_generate(model, [[3, 4, 5]] * 4000, temperature=1.0, **OPTIONS | {"max_new_tokens": 1})
    with torch.no_grad():
        expected = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1)
    share = torch.bincount(torch.tensor(found).flatten(), minlength=len(expected)) / len(found)
    assert (share - expected).abs().max() < 4 * (0.25 / len(found)) ** 0.5


def test_a_model_that_cannot_go_on_from_a_prompts_states_runs_it_again(caplog):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, initializer_range=0.3, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING):
        assert not exact_sharing(model, QUESTIONS, 0)
    assert "MambaForCausalLM cannot go on from a prompt's states" in caplog.text


def test_a_wrong_cache_is_seen(monkeypatch):
    model, _ = small()
    assert exact_sharing(model, QUESTIONS, 0)
    monkeypatch.setattr(
        transformers.DynamicCache,
        "batch_select_indices",
        lambda self, rows: [
            setattr(layer, name, getattr(layer, name)[rows.flip(0)])
            for layer in self.layers
            for name in ("keys", "values")
        ],
    )
    assert not exact_sharing(model, QUESTIONS, 0), "the states of another prompt"


def test_a_cache_that_is_asked_for_is_left_to_transformers():
    model, seen = small()
    config = transformers.GenerationConfig(max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    with prompts_run_once(model):
        model.generate(
            input_ids=torch.tensor([[3, 4]] * 2), attention_mask=torch.ones(2, 2).long(), generation_config=config
        )
    assert seen[0] == (2, 2)


def test_what_is_said_of_the_completions_of_a_prompt():
    wait = VOCABULARY.index("WAIT")
    completions = [[1, 2], [1, 2], [3, wait, 4, 5], [3], [1, wait], [2, wait, wait]]
    rows = facts(completions, EpistemicMarkers(("wait",)), build_tokenizer())
    assert [row[:2] for row in rows] == [(2, 0), (2, 0), (4, 1), (1, 0), (2, 1), (3, 2)]
    found = within_prompts(rows, 3)
    lengths, markers = ([2, 2, 4], [1, 2, 3]), ([0, 0, 1], [0, 1, 2])
    assert found["prompts/length_std"] == pytest.approx(statistics.mean(map(statistics.stdev, lengths)))
    assert found["prompts/markers_std"] == pytest.approx(statistics.mean(map(statistics.stdev, markers)))
    assert found["prompts/distinct"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_step_takes_fewer_prompts_and_all_of_each_ones_completions(tmp_path):
    config = CONFIG.__class__(**{**vars(CONFIG), "steps": 2, "num_generations": 2})
    places = [loop._rows(step, config, len(PROMPTS)) for step in range(5)]
    assert all(rows[::2] == rows[1::2] for rows in places) and {len(rows) for rows in places} == {4}
    assert sorted(row for rows in places for row in rows[::2]) == list(range(len(PROMPTS))), "an epoch"
    assert loop._rows(0, CONFIG, len(PROMPTS))[:2] == places[0][::2], "in the order of one completion each"
    whole = run(tmp_path / "whole", config).metrics
    assert all(0 < row["prompts/distinct"] <= 1 and row["prompts/length_std"] >= 0 for row in whole)
    half = CONFIG.__class__(**{**vars(config), "steps": 1})
    run(tmp_path / "resumed", half)
    assert deterministic(run(tmp_path / "resumed", config, resume=True).metrics) == deterministic(whole)
    with pytest.raises(ValueError, match=r"output_dir: expected a checkpoint of this very run .* num_generations"):
        run(tmp_path / "resumed", CONFIG, resume=True)
    alike = run(tmp_path / "alike", half, generate=fixed_generate).metrics
    assert [row["prompts/distinct"] for row in alike] == [0.5]
    assert [row["prompts/length_std"] for row in alike] == [0]


@pytest.mark.parametrize(("number", "message"), [(0, "at least 1; got 0"), (3, "a divisor of the 4 completions")])
def test_completions_that_are_not_whole_prompts_are_refused(number, message):
    with pytest.raises(ValueError, match=rf"num_generations: expected {message}"):
        TrainConfig(batch_size=4, num_generations=number)
