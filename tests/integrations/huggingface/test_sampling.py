"""Samples are the student's own distribution at the temperature asked for, whatever its checkpoint recommends."""

import warnings

import pytest
import torch
from tiny_models import tiny_qwen3

from popsd_integrations.huggingface.packing import padded
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import (
    Sampler,
    check_positions,
    exact_grouping,
    hf_generate,
    only_given_settings,
    position_limit,
    special_tokens,
)
from popsd_integrations.miniature.sampler import sample as miniature_sample
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer

pytest.importorskip("transformers")

EOS, PAD = VOCABULARY.index("EOS"), VOCABULARY.index("PAD")
OPTIONS = {"max_new_tokens": 8, "eos_token_id": [EOS], "pad_token_id": PAD}
PROMPT = [11, 3, 13]
HOSTILE = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[4], [5, 6]],
    "suppress_tokens": [1, 2, 3],
    "begin_suppress_tokens": [7, 8],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 3,
    "sequence_bias": [[[4], 10.0]],
    "exponential_decay_length_penalty": (1, 5.0),
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "guidance_scale": 3.0,
    "min_new_tokens": 8,
    "min_length": 30,
    "max_time": 1e-9,
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": 3.0,
    "early_stopping": True,
    "stop_strings": ["WAIT"],
    "prompt_lookup_num_tokens": 2,
    "watermarking_config": {"bias": 9.0},
    "return_dict_in_generate": True,
    "output_scores": True,
}
"""Every setting of a generation_config that changes which tokens come out, how many rows, or in what form."""


def tiny(hostile=()):
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    model = tiny_qwen3(len(VOCABULARY), tie_word_embeddings=True, initializer_range=0.2, **special).eval()
    for name in hostile:
        setattr(model.generation_config, name, HOSTILE[name])
    return model


def test_the_hostile_settings_are_transformers_own():
    """Not in every version: top_h is young."""
    known = [name for name in HOSTILE if hasattr(tiny().generation_config, name)]
    assert len(known) >= len(HOSTILE) - 2


def logits_after(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def greedy(model, prompt, count):
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != EOS):
        ids.append(int(logits_after(model, ids).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "hostile", [(), *((name,) for name in HOSTILE), tuple(HOSTILE)], ids=lambda x: ",".join(x)[:40]
)
def test_temperature_0_is_the_argmax(hostile):
    model, plain = tiny(hostile), tiny()
    prompts = [PROMPT, [1, 2, 3, 4, 5, 6]]
    expected = [greedy(plain, prompt, 8) for prompt in prompts]
    assert hf_generate(model, prompts, temperature=0.0, **OPTIONS) == expected


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_students_softmax(temperature, adapter):
    """First and second tokens of 3,000 samples, each frequency within five standard errors."""
    model = tiny(HOSTILE)
    if adapter:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    options = OPTIONS | {"max_new_tokens": 2}
    drawn = hf_generate(model, [PROMPT] * 3000, temperature=temperature, **options)
    assert len(drawn) == 3000
    first = torch.tensor([ids[0] for ids in drawn])
    common = int(first[first != EOS].mode().values)
    second = torch.tensor([ids[1] for ids in drawn if ids[0] == common])
    for prefix, tokens in ((PROMPT, first), ([*PROMPT, common], second)):
        p = (logits_after(model, prefix) / temperature).softmax(-1)
        found = torch.bincount(tokens, minlength=len(VOCABULARY)) / len(tokens)
        assert len(tokens) > 300
        assert ((found - p).abs() <= 5 * (p * (1 - p) / len(tokens)).sqrt() + 1 / len(tokens)).all()


def test_the_models_own_settings_come_back():
    model = tiny(HOSTILE)
    own, before = model.generation_config, model.generation_config.to_dict()
    hf_generate(model, [PROMPT], temperature=1.0, **OPTIONS)

    def fail():
        with only_given_settings(model):
            assert model.generation_config is not own
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert model.generation_config is own and own.to_dict() == before


def test_completions_are_cut_after_the_first_end_and_unmoved_by_padding():
    model = tiny()
    prompts = [[11, a, 13] for a in range(5)] + [[1, 2, 3, 4, 5, 6]]
    completions = hf_generate(model, prompts, temperature=0.0, **OPTIONS)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert 1 <= len(completion) <= 8 and EOS not in completion[:-1]
        assert len(completion) == 8 or completion[-1] == EOS
        assert hf_generate(model, [prompt], temperature=0.0, **OPTIONS) == [completion]
    everything = hf_generate(model, prompts, temperature=0.0, **(OPTIONS | {"eos_token_id": range(22)}))
    assert all(len(completion) == 1 for completion in everything)


def recurrent_gemma():
    import transformers

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    sizes |= {"intermediate_size": 24, "lru_width": 16, "pad_token_id": PAD, "eos_token_id": EOS}
    return wide(transformers.RecurrentGemmaConfig(vocab_size=len(VOCABULARY), **sizes))


def rwkv():
    import transformers

    return wide(transformers.RwkvConfig(vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2))


def wide(config):
    """A model with weights so large that its greedy completions differ."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(
    ("build", "grouping", "calls"), [(tiny, "together", 1), (recurrent_gemma, "by length", 2), (rwkv, "alone", 4)]
)
def test_completions_of_a_batch_are_those_of_each_prompt_alone(monkeypatch, build, grouping, calls):
    """RecurrentGemma sees the padding on the left, and RWKV's cached states mix the rows of a batch."""
    model, seen = build(), []
    prompts = [[11, 3, 13], [1, 2, 3, 4, 5, 6], [5, 9, 2], [9, 8, 7]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert exact_grouping(model, prompts, PAD) == grouping
        real = model.generate

        def generate(**options):
            seen.append(options["generation_config"].max_new_tokens)
            return real(**options)

        monkeypatch.setattr(model, "generate", generate)
        completions = hf_generate(model, prompts, temperature=0.0, **OPTIONS)
    assert completions == [greedy(model, prompt, 8) for prompt in prompts] and seen.count(8) == calls
    together = real(
        input_ids=padded(prompts, PAD)[0], attention_mask=padded(prompts, PAD)[1], max_new_tokens=8, do_sample=False
    )  # fmt: skip
    same = [row[: len(own)] == own for row, own in zip(together[:, 6:].tolist(), completions, strict=True)]
    assert all(same) == (grouping == "together"), "the model would not show it"


def test_an_architecture_that_must_be_sampled_otherwise_is_named():
    with pytest.warns(UserWarning, match="RwkvForCausalLM sees the other rows when it generates.* sampled alone"):
        exact_grouping(rwkv(), [[1, 2]], PAD)


def test_a_sampler_asks_for_the_questions_in_eval_mode():
    model, tokenizer, calls = tiny().train(), build_tokenizer(), []

    def generate(model, prompts, **options):
        calls.append((model.training, prompts, options))
        return [[1] for _ in prompts]

    sampler = Sampler(model, tokenizer, max_new_tokens=4, temperature=0.5, generate=generate)
    rows = [Prompts([1, 2], [3], [4]), Prompts([5], [6], [7])]
    assert sampler(model, rows) == [[1], [1]] and model.training
    options = {"max_new_tokens": 4, "temperature": 0.5, "eos_token_id": [EOS], "pad_token_id": PAD}
    assert calls == [(False, [[1, 2], [5]], options)]
    assert Sampler(model, tokenizer, max_new_tokens=4, temperature=0.0)(model, rows) == hf_generate(
        model.eval(), [[1, 2], [5]], temperature=0.0, **(OPTIONS | {"max_new_tokens": 4})
    )


def test_special_tokens_are_the_models_then_the_tokenizers():
    model, tokenizer = tiny(), build_tokenizer()
    model.generation_config.eos_token_id = [EOS, 3]
    assert special_tokens(model, tokenizer) == ([EOS, 3], PAD)
    model.generation_config.eos_token_id = None
    assert special_tokens(model, tokenizer) == ([tokenizer.eos_token_id], PAD)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: expected an eos_token_id; got None"):
        special_tokens(model, tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_the_loss_has_not_are_not_sampled(temperature):
    """All but four rows of this head are taken as padding; the samples follow the softmax of the four, as in the loss."""
    model = tiny()
    drawn = hf_generate(
        model, [PROMPT] * 600, temperature=temperature, **(OPTIONS | {"max_new_tokens": 2}), vocab_size=4
    )
    first = torch.tensor([ids[0] for ids in drawn])
    assert max(max(ids) for ids in drawn) < 4 <= logits_after(model, PROMPT).argmax()
    p = logits_after(model, PROMPT)[:4].softmax(-1)
    if temperature:
        found = torch.bincount(first, minlength=4) / 600
        assert ((found - p).abs() <= 5 * (p * (1 - p) / 600).sqrt() + 1 / 600).all()
    else:
        assert (first == p.argmax()).all()


def test_the_miniatures_sampler_leaves_them_out_too():
    drawn = miniature_sample(tiny(), [PROMPT] * 50, temperature=1.0, **OPTIONS, vocab_size=4)
    assert max(max(ids) for ids in drawn) == 3


def test_a_generate_of_ones_own_is_told_and_checked():
    model, told = tiny(), []

    def generate(model, prompts, **options):
        told.append(options["vocab_size"])
        return [[1, 10], [3, 11]]

    with pytest.raises(ValueError, match=r"vocab_size: expected more than an end-of-sequence token, .*\[19\]; got 11"):
        Sampler(model, build_tokenizer(), max_new_tokens=2, temperature=1.0, vocab_size=11)
    model.generation_config.eos_token_id = [EOS, 5]
    sampler = Sampler(model, build_tokenizer(), max_new_tokens=2, temperature=1.0, generate=generate, vocab_size=11)
    with pytest.raises(ValueError, match=r"generate: expected tokens below vocab_size=11; got 11 in completion 1"):
        sampler(model, [Prompts([1], [1], [1])] * 2)
    assert told == [11]
    with pytest.raises(ValueError, match=r"generate: expected 3 completions; got 2\. Return one completion per prompt"):
        sampler(model, [Prompts([1], [1], [1])] * 3)
    with pytest.raises(
        ValueError, match=r"vocab_size: expected at most 22, the rows of the head; got 23\. Leave it out"
    ):
        Sampler(model, build_tokenizer(), max_new_tokens=2, temperature=1.0, vocab_size=23)


@pytest.mark.parametrize("said", [0, -1])
def test_a_model_that_says_no_number_of_positions_has_no_limit(said):
    model = tiny()
    model.config.max_position_embeddings = said
    assert position_limit(model) is None


def test_prompts_beyond_the_models_positions_are_refused():
    from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=22, n_positions=12, n_embd=8, n_layer=1, n_head=1, eos_token_id=EOS))
    fits = Prompts([1] * 3, [1] * 10, [1] * 4)
    check_positions(gpt2, [fits], 2)
    message = r"prompts\[1\]: expected at most the model's 12 positions; got 11 tokens in reference and up to 2 behind"
    with pytest.raises(ValueError, match=message):
        check_positions(gpt2, [fits, fits._replace(reference=[1] * 11)], 2)
    sampler = Sampler(gpt2, build_tokenizer(), max_new_tokens=3, temperature=1.0)
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*got 10 tokens in teacher.*Set max_prompt_length=9"):
        sampler(gpt2, [fits])
    gpt2.config = BloomConfig()  # ALiBi
    assert position_limit(gpt2) is None
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
    model = tiny()
    model.config.rope_parameters, model.config.max_position_embeddings = rope, 120
    assert position_limit(model) == 400
