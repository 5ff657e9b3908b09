"""What vLLM is sent, and that sending moves nothing. A model on the CPU stands in for vLLM; TRL's own code drives it."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from tiny_models import tiny_qwen3
from trl.generation.vllm_generation import VLLMGeneration
from trl_helpers import EOS, ROWS, build, config, tiny
from vllm_in_place import put_in_place

from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer
from popsd_integrations.trl_trainer.vllm.options import check_options, check_sampling
from popsd_integrations.trl_trainer.vllm.weights import StudentWeights, check_weights

LINEAR = "all-linear"
ADAPTERS = {
    "lora": (True, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_rslora=True)),
    "dora": (True, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_dora=True)),
    "head": (False, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head", "embed_tokens"])),
    "modules_to_save": (
        False,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "tied modules_to_save": (
        True,
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    ),
}


def moved(model, scale=0.02):
    """Every trained parameter elsewhere than at its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def adapted(name, dtype=torch.bfloat16, scale=0.02):
    tied, lora = ADAPTERS[name]
    model = tiny_qwen3(40, tie_word_embeddings=tied, initializer_range=0.2).to(dtype)
    return moved(get_peft_model(model, copy.deepcopy(lora), autocast_adapter_dtype=False), scale)


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names_of_trl(model):
    """TRL's own walk, which merges: on a copy."""
    generation = object.__new__(VLLMGeneration)
    generation.model = copy.deepcopy(model)
    generation._dist = SimpleNamespace(gather_params=lambda _: torch.no_grad(), is_fsdp=False)
    return [name for name, _ in generation._iter_named_params()]


def merged_in_float64(model):
    """By name: W + scaling B A, by rows of length m with DoRA; the trained copy; and W elsewhere."""
    parameters = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    expected = {}
    for name, tensor in parameters.items():
        plain = name.removeprefix("base_model.model.")
        if "lora_" in plain or "original_module" in plain:
            continue
        weight, path = tensor, name.removesuffix(".base_layer.weight")
        if path != name:
            embedding = f"{path}.lora_embedding_A.default" in parameters
            a, b = (
                parameters[f"{path}.lora_embedding_{x}.default" if embedding else f"{path}.lora_{x}.default.weight"]
                for x in "AB"
            )
            product = (b @ a).T if embedding else b @ a
            weight = weight + model.get_submodule(path).scaling["default"] * product
            magnitude = parameters.get(f"{path}.lora_magnitude_vector.default.weight")
            if magnitude is not None:
                weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        expected[plain.replace(".base_layer", "").replace(".modules_to_save.default", "")] = weight
    return expected


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_are_those_of_the_merged_model_and_nothing_moves(name):
    model = adapted(name)
    check_weights(model)
    before, expected = bits(model), merged_in_float64(model)
    for _ in range(20):
        sent = [(key, tensor) for key, tensor in StudentWeights(model)]
    assert same(bits(model), before)
    assert [key for key, _ in sent] == names_of_trl(model)
    assert {key for key, _ in sent} == expected.keys()
    other = total = 0
    for key, tensor in sent:
        assert tensor.dtype == torch.bfloat16 and not tensor.requires_grad
        # Rounded once, from float32 instead of float64: another neighbour only where the sum lies between two.
        torch.testing.assert_close(tensor.double(), expected[key], rtol=2**-8, atol=1e-7)
        other, total = other + int((tensor != expected[key].bfloat16()).sum()), total + tensor.numel()
    assert other <= 1e-3 * total


def test_float32_weights_and_what_rounding_takes():
    model = adapted("lora", torch.float32)
    weights, expected = StudentWeights(model), merged_in_float64(model)
    for key, tensor in weights:
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-6, atol=1e-7)
    assert weights.rounding == 0
    rounded = StudentWeights(model, dtype=torch.bfloat16)
    sent = dict(rounded)["model.layers.0.self_attn.q_proj.weight"]
    assert sent.dtype == torch.bfloat16 and rounded.rounding > 0
    small = adapted("lora", scale=1e-4)
    weights, expected = StudentWeights(small), merged_in_float64(small)
    lost = delta = 0
    for key, tensor in weights:
        lost += (tensor.double() - expected[key]).square().sum()
        base = dict(small.get_base_model().named_parameters()).get(key.replace(".weight", ".base_layer.weight"))
        delta += 0 if base is None else (expected[key] - base.double()).square().sum()
    assert weights.rounding == pytest.approx(float((lost / delta).sqrt()), rel=1e-3)
    assert weights.rounding > 0.5


def test_a_merge_that_fails_leaves_the_model(monkeypatch):
    model = adapted("dora")
    before = bits(model)
    layer = next(module for module in model.modules() if hasattr(module, "merge") and hasattr(module, "lora_A"))

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(layer), "merge", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        list(StudentWeights(model))
    assert same(bits(model), before)


@pytest.fixture
def vllm(monkeypatch):
    put_in_place(monkeypatch)


@pytest.mark.parametrize("lora", [True, False])
def test_the_trainer_samples_from_the_student_and_leaves_the_base(lora, vllm, tmp_path):
    trainer = build(
        tmp_path,
        model=tiny().bfloat16(),
        cls=PurifiedOPSDTrainer,
        lora=lora,
        use_vllm=True,
        max_steps=4,
        eval_rows=ROWS,
    )
    llm = trainer.vllm_generation.llm
    assert trainer.vllm_generation.max_model_length == 4 + 6  # "Q 0 0 A" and a completion
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert llm.syncs == 4 and all(params.stop_token_ids == [EOS] for params in llm.sampled)
    assert len({params.seed for params in llm.sampled}) == len(llm.sampled) == 16
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    logged = [row["vllm_rounding"] for row in trainer.state.log_history if "vllm_rounding" in row]
    assert len(logged) == (4 if lora else 0) and all(0 <= x <= 1.5 for x in logged)


def test_the_best_checkpoint_is_sent_when_it_is_loaded(vllm, tmp_path):
    often = dict.fromkeys(("eval_steps", "save_steps"), 1) | dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = build(
        tmp_path, cls=PurifiedOPSDTrainer, lora=True, use_vllm=True, max_steps=2, eval_rows=ROWS[:2], **often, **best
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1") and trainer.state.global_step == 2
    held = dict(trainer.vllm_generation.llm.model.named_parameters())
    best = dict(StudentWeights(trainer.model))
    assert any(not torch.equal(held[name], tensor) for name, tensor in best.items())  # those of step 2
    trainer.evaluate()
    assert all(torch.equal(held[name], tensor) for name, tensor in best.items())


def test_students_that_cannot_be_sent_are_refused():
    with pytest.raises(ValueError, match="expected FSDP2 with an adapter; got FSDP1"):
        check_weights(adapted("lora"), fsdp_version=1)
    tied = get_peft_model(
        tiny_qwen3(40, tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens", "q_proj"])
    )
    with pytest.raises(ValueError, match="expected the embeddings and the head to stay tied"):
        check_weights(tied)
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1]})
    with pytest.raises(ValueError, match="expected an adapter that merges into the weights"):
        check_weights(get_peft_model(tiny_qwen3(40), tokens))
    quantised = tiny_qwen3(40)
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="expected a model that is not quantised"):
        check_weights(quantised)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_server_port": 1}, "vllm_server_port: expected it left out, since use_vllm is False; got 1"),
        ({"use_vllm": True, "vllm_server_port": 1}, "since there is no server"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_enable_sleep_mode": True}, "has options of its own"),
        ({"use_vllm": True, "vllm_mode": "other"}, "vllm_mode: expected 'colocate' or 'server'; got 'other'"),
        ({"use_vllm": True, "cache_implementation": "static"}, "cache_implementation: expected None with use_vllm"),
        ({"use_vllm": True, "generation_kwargs": {"seed": 3}}, "would draw the same random numbers"),
        ({"use_vllm": True, "generation_kwargs": {"stop": "x"}}, "expected no 'stop' with use_vllm"),
    ],
)
def test_options_that_nothing_reads_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_options_that_are_read_pass(tmp_path, vllm):
    check_options(config(tmp_path, use_vllm=True, vllm_max_model_length=64, vllm_enable_sleep_mode=True))
    check_options(config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://x"))
    check_sampling({"temperature": 0.5})
    with pytest.raises(ValueError, match=r"expected arguments of vllm.SamplingParams with use_vllm; got typical_p"):
        check_sampling({"typical_p": 0.5})
