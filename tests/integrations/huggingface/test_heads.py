import pytest
import torch

from popsd_integrations.huggingface.frozen import frozen_weights
from popsd_integrations.huggingface.heads import head_from_model, hidden_states, same_head
from popsd_integrations.huggingface.invariants import check_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

V, D = 53, 32
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def tiny(name="Qwen3", **options):
    torch.manual_seed(0)
    sizes = {
        key: value for key, value in SIZES.items() if name != "GPT2" or key.endswith("_token_id") or key == "vocab_size"
    }
    if name == "GPT2":
        sizes |= {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    if name == "Phi":
        sizes.pop("head_dim")
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def logits_of(head, hidden):
    logits = head.logit_scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
MINICPM = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
MODELS = {
    "Qwen3": ({}, {"logit_scale": 1.0, "softcap": None}),
    "Llama": ({"tie_word_embeddings": True}, {"logit_scale": 1.0}),
    "Gemma2": ({"final_logit_softcapping": 3.0}, {"softcap": 3.0}),
    "Cohere": ({"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "Granite": ({"logits_scaling": 4.0}, {"logit_scale": 0.25}),
    "HyperCLOVAX": ({"logits_scaling": 4.0}, {"logit_scale": 4.0}),
    "MiniCPM3": ({"dim_model_base": 8, **MINICPM}, {"logit_scale": 0.25}),
    "FalconH1": ({"lm_head_multiplier": 0.5, **FALCON}, {"logit_scale": 0.5}),
    "GPT2": ({}, {"logit_scale": 1.0}),
    "Phi": ({}, {"logit_scale": 1.0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_head_and_hidden_states_give_the_models_own_logits(name):
    options, expected = MODELS[name]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    model = tiny(name, **options)
    ids = torch.randint(3, V, (2, 7))
    head = head_from_model(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert logits.abs().max() > 0.5
        torch.testing.assert_close(logits_of(head, hidden_states(model, ids)), logits, rtol=1e-4, atol=1e-4)
    for field, value in expected.items():
        assert getattr(head, field) == value
    assert (head.bias is not None) == (name == "Phi")
    assert head.weight is model.get_output_embeddings().weight
    check_model(model)


def test_position_ids_undo_left_padding():
    model = tiny("GPT2")
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(0)
    with torch.no_grad():
        plain, moved = hidden_states(model, ids), hidden_states(model, padded, mask, positions)[:, 2:]
        without = hidden_states(model, padded, mask)[:, 2:]
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-5)
    assert (plain - without).abs().max() > 1e-2


def lora(model, **options):
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **options)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
@pytest.mark.parametrize("tied", [False, True])
def test_lora_is_active_and_the_frozen_head_is_fetched_inside(options, tied):
    model = lora(tiny(tie_word_embeddings=tied), target_modules=["q_proj", "v_proj"], **options)
    ids = torch.randint(3, V, (2, 7))
    with torch.no_grad():
        outside = head_from_model(model)
        on = logits_of(outside, hidden_states(model, ids))
        torch.testing.assert_close(on, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            inside = head_from_model(model)
            off = logits_of(inside, hidden_states(model, ids))
            torch.testing.assert_close(off, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (on - off).abs().max() > 1e-2
    assert same_head(outside, inside) == (not options)
    check_model(model)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [5, 7]}])
def test_adapted_head_is_refused(options):
    model = lora(tiny(tie_word_embeddings=True), **{"target_modules": ["q_proj"], **options})
    with pytest.raises(ValueError, match=r"model: .*without an adapter.*modules_to_save"):
        head_from_model(model)


def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny(), config)
    for call in (head_from_model, lambda model: hidden_states(model, torch.tensor([[5]]))):
        with pytest.raises(ValueError, match=r"model: .*prompt-learning.*LoraConfig"):
            call(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_head_is_refused(dtype):
    model = tiny()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, D).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"model: expected an lm_head of 16 bits or more.*{dtype}.*unquantised"):
        head_from_model(model)


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"model: .*AutoModelForCausalLM"):
        head_from_model(tiny().model)


def test_a_head_that_is_more_than_a_projection_is_read_at_its_last_step():
    """RoBERTa's head is a dense layer, a norm and a projection; the states are what the projection takes."""
    model = tiny("Roberta", is_decoder=True, max_position_embeddings=64, num_key_value_heads=None, head_dim=None)
    torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.randint(3, V, (2, 7))
    states = hidden_states(model, ids)
    torch.testing.assert_close(
        logits_of(head_from_model(model), states), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    states.square().sum().backward()
    assert model.lm_head.dense.weight.grad.norm() > 0
    assert "forward" not in vars(model.get_output_embeddings())
    check_model(model)


def test_a_backbone_below_another_is_found():
    """In Llama 4 and Mllama the text model, head included, is one part of the multimodal model."""
    text = {key: SIZES[key] for key in SIZES if key != "head_dim"} | {"head_dim": 16, "intermediate_size_mlp": 32}
    text |= {"num_local_experts": 2, "attn_temperature_tuning": False, "attention_chunk_size": 64}
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
    }
    vision |= {"vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 16, "patch_size": 14}
    config = transformers.Llama4Config(vision_config=vision, text_config=text)
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    ids = torch.randint(3, V, (1, 7))
    with torch.no_grad():
        logits = logits_of(head_from_model(model), hidden_states(model, ids))
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_wrappers_run_in_their_own_forward(process_group, monkeypatch, wrapper, tied):
    """Their forward is where gradients are reduced and shards gathered; an own loop passes the wrapper itself."""
    ids = torch.randint(3, V, (2, 7))
    plain = tiny(tie_word_embeddings=tied).train()
    logits_of(head_from_model(plain), hidden_states(plain, ids)).square().mean().backward()
    model = tiny(tie_word_embeddings=tied).train()
    if wrapper == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"model: expected the DistributedDataParallel around it.*the wrapper"):
            hidden_states(model.module, ids)
    else:
        fully_shard = torch.distributed.fsdp.fully_shard
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert check_model(model, (), frozen_weights(plain)) == "left"
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(output))
    states = hidden_states(model, ids)
    assert len(calls) == 1
    logits_of(head_from_model(model), states).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        grad = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_fsdp1_is_refused_outside_its_forward(process_group):
    model = torch.distributed.fsdp.FullyShardedDataParallel(tiny(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"inside the forward of FullyShardedDataParallel.*run_in_forward"):
        hidden_states(model, torch.tensor([[5]]))
