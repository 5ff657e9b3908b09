"""What a model must be to be trained: each fault is planted, and must be refused by its name or got around."""

import copy

import pytest
import torch
from tiny_models import tiny_qwen3

from popsd import Head
from popsd_integrations.huggingface import invariants
from popsd_integrations.huggingface.frozen import (
    EMA,
    AdapterOff,
    FrozenChecksum,
    FrozenCopy,
    FrozenModel,
    frozen_weights,
)
from popsd_integrations.huggingface.heads import use_head
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.prompts import Prompts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PROMPTS = [Prompts([3, 4, 5], [3, 4, 5, 9, 8, 7, 13, 14], [9, 8, 7, 21]), Prompts([6], [6, 11, 12], [11, 12])]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GEMMA = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.3}


def tiny(**options):
    return tiny_qwen3(40, initializer_range=0.3, **options).eval()


def lora(model=None, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | options)
    return peft.get_peft_model(model or tiny(), config)


def built(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def moved(model):
    """A model whose trained parameters are no longer those of the start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "modules_to_save", "add_adapter", "ema"])
def test_a_good_model_passes_and_is_left_as_it_was(kind):
    options = {"dora": {"use_dora": True}, "modules_to_save": {"modules_to_save": ["lm_head"]}}.get(kind, {})
    model = tiny()
    if kind == "add_adapter":
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    elif kind not in ("full", "ema"):
        model = lora(model, **options)
    model.train()
    source = EMA(model, 0.9) if kind == "ema" else frozen_weights(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert check_model(model, PROMPTS, source) == "left"
    assert check_model(model, PROMPTS[:1], source) == check_model(model, (), source) == check_model(model) == "left"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_adapters_that_rewrite_the_base_are_refused(how):
    model = lora(init_lora_weights=how)
    with pytest.raises(
        ValueError, match=rf"frozen: .* a divergence of 0; got .* nats\. init_lora_weights='{how}' starts"
    ):
        check_model(model, PROMPTS, frozen_weights(model))


def test_a_trained_adapter_is_refused():
    model = moved(lora())
    with pytest.raises(ValueError, match=r"frozen: expected .* divergence of 0; got .*trained already\. Merge it"):
        check_model(model, PROMPTS, frozen_weights(model))
    assert check_model(model, PROMPTS) == "left", "nothing to compare it with"


@pytest.mark.parametrize("what", ["bias", "norm", "embedding"])
def test_parameters_trained_beside_the_adapter_are_refused(what):
    model = lora(tiny(attention_bias=True), bias="all" if what == "bias" else "none")
    for name, p in model.named_parameters():
        if (what == "norm" and "layernorm" in name) or (what == "embedding" and "embed_tokens" in name):
            p.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"model: expected that only an adapter is trained .*; got \d+ trained .*bias='none'"
    ):
        check_model(model, PROMPTS, frozen_weights(model))
    assert check_model(model, PROMPTS, FrozenModel(tiny(attention_bias=True))) == "left"


def test_the_student_itself_is_no_frozen_model():
    model = tiny()
    with pytest.raises(ValueError, match=r"model: expected that only an adapter is trained"):
        check_model(model, PROMPTS, FrozenModel(model))


def test_frozen_weights_of_another_dtype_or_value_are_refused():
    model = tiny()
    with pytest.raises(
        ValueError, match=r"frozen: expected weights in the student's torch.float32; got torch.bfloat16"
    ):
        check_model(model, PROMPTS, FrozenCopy(copy.deepcopy(model).bfloat16()))
    source = FrozenCopy(model)
    with pytest.raises(ValueError, match=r"frozen: expected .* a divergence of 0; got .*before it is trained"):
        check_model(moved(model), PROMPTS, source)


def test_a_model_that_trains_nothing_is_refused():
    model = lora().requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: expected parameters that require grad; got none.*is_trainable=True"):
        check_model(model, PROMPTS, AdapterOff(model))


def test_padding_goes_to_the_side_that_the_architecture_does_not_see(caplog):
    model = built(transformers.RecurrentGemmaConfig(**GEMMA | {"num_hidden_layers": 3, "lru_width": 16}))
    assert model.get_input_embeddings().weight[0].abs().max() == 0, "hides it, until the padding is seen by other means"
    assert check_model(model, PROMPTS, frozen_weights(model)) == "right"
    assert "RecurrentGemmaForCausalLM sees padding on the left (logits off by" in caplog.text
    with pytest.raises(ValueError, match=r"model: expected padding that RecurrentGemmaForCausalLM does not see"):
        check_model(model, PROMPTS, sides=["left"])


def test_padding_goes_to_the_side_where_gradients_are_finite():
    """Gemma-3n divides by the norm of each position's embedding, and a pad token's is zero when it is fresh."""
    parts = {
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": 40,
        "num_kv_shared_layers": 0,
    }
    parts |= {
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [24, 24],
    }
    model = built(transformers.Gemma3nTextConfig(**GEMMA | parts))
    assert model.get_input_embeddings().weight[0].abs().max() == 0
    source = frozen_weights(model)
    assert check_model(model, PROMPTS) == "left", "its logits are exact there"
    assert check_model(model, PROMPTS, source) == "right"
    with pytest.raises(
        ValueError, match=r"model: expected finite gradients over padded rows; got NaN .*tokenizer\.pad_token"
    ):
        check_model(model, PROMPTS, source, sides=["left"])


def test_padding_that_is_seen_on_both_sides_is_refused():
    model = tiny()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + output.mean((0, 1)))
    with pytest.raises(
        ValueError, match=r"model: expected padding that Qwen3ForCausalLM does not see.*off by .* on the left"
    ):
        check_model(model, PROMPTS)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_model_that_sees_the_future_is_refused(is_decoder):
    model = built(transformers.BertGenerationConfig(**SIZES, is_decoder=is_decoder, initializer_range=0.3))
    if is_decoder:
        assert check_model(model, PROMPTS) == "left"
        return
    with pytest.raises(
        ValueError, match=r"model: expected a causal language model; .*BertGenerationDecoder.*is_decoder=True"
    ):
        check_model(model, PROMPTS)


def test_dropout_is_named_whether_it_is_a_module_or_not(caplog):
    def messages(model):
        caplog.clear()
        check_model(model.train(), PROMPTS)
        return caplog.text

    assert messages(tiny()) == ""
    assert "layers.0.self_attn.q_proj.lora_dropout.default.p and 4 in all" in messages(lora(lora_dropout=0.1))
    assert "The student has dropout (config.attention_dropout and 1 in all" in messages(tiny(attention_dropout=0.2))
    check_model(tiny(attention_dropout=0.2), PROMPTS)
    model = tiny().train()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * (1.5 if module.training else 1.0))
    with pytest.raises(
        ValueError, match=r"model: expected the same logits in train mode and in eval mode; Qwen3ForCausalLM"
    ):
        check_model(model, PROMPTS)


def test_an_unknown_head_is_refused_until_it_is_handed_over():
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(
        ValueError, match=r"model: .*Qwen3ForCausalLM.*relative difference of 0\.3.*use_head\(model, head_fn\)"
    ):
        check_model(model, PROMPTS)
    use_head(model, lambda causal: Head(causal.lm_head.weight, logit_scale=1.5))
    assert check_model(model, PROMPTS, frozen_weights(model)) == "left", "the copy has it too"
    assert check_model(lora(model), PROMPTS) == "left"


def test_a_head_function_that_reads_another_model_is_refused():
    """The frozen head would then move with the student's."""
    model = tiny()
    weight = model.lm_head.weight
    use_head(model, lambda causal: Head(weight))
    with pytest.raises(ValueError, match=r"frozen weights whose head is not trained.*head_fn of use_head must read"):
        check_model(model, PROMPTS, frozen_weights(model))
    use_head(model, lambda causal: Head(causal.lm_head.weight))
    assert check_model(model, PROMPTS, frozen_weights(model)) == "left"


def test_sixteen_bits_are_held_to_their_own_rounding():
    model = tiny().bfloat16()
    assert check_model(model, PROMPTS, frozen_weights(model)) == "left"
    assert invariants.tolerance(model) == (2e-2, 0.5)


class TestChecksum:
    def test_training_does_not_move_it(self):
        for model in (lora(modules_to_save=["lm_head"]), tiny()):
            checksum = FrozenChecksum(frozen_weights(model))
            assert len(checksum.values) == len(list(tiny().parameters()))
            moved(model)
            checksum.check()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_entry_moves_it(self, dtype):
        model = lora(tiny().to(dtype))
        checksum = FrozenChecksum(frozen_weights(model))
        with torch.no_grad():
            weight = model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight
            weight[0, 0] += weight[0, 0].abs() * 0.01 + 1e-3
        with pytest.raises(
            RuntimeError, match=r"frozen weights: expected those of the start; 1 of \d+ .*down_proj.*float32"
        ):
            checksum.check()

    def test_a_merge_in_sixteen_bits_moves_it(self):
        model = moved(lora(tiny().bfloat16()))
        checksum = FrozenChecksum(AdapterOff(model))
        model.merge_adapter()
        model.unmerge_adapter()
        with pytest.raises(RuntimeError, match=r"4 of \d+ parameters have changed.*vLLM's weight sync"):
            checksum.check()

    def test_an_average_may_move_but_not_what_it_shares(self):
        model = lora()
        ema = EMA(model, 0.5)
        checksum = FrozenChecksum(ema)
        moved(model)
        ema.update()
        checksum.check()
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"q_proj"):
            checksum.check()


def test_an_adapter_put_on_by_transformers_is_switched_off_and_on():
    model = tiny()
    plain = copy.deepcopy(model)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    )
    moved(model)
    ids = torch.tensor([[3, 4, 5]])
    on = model(input_ids=ids).logits
    with AdapterOff(model).weights() as frozen:
        torch.testing.assert_close(frozen(input_ids=ids).logits, plain(input_ids=ids).logits)
    torch.testing.assert_close(model(input_ids=ids).logits, on)
    assert (on - plain(input_ids=ids).logits).abs().max() > 1e-2
    assert isinstance(frozen_weights(model), AdapterOff)
