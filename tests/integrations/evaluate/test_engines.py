"""The transformers engine: what an adapter leaves in the base when it is taken out again."""

import pytest
import torch
from evaluate_files import save_adapter, save_model

from popsd_integrations.evaluate.checkpoints import resolve
from popsd_integrations.evaluate.engines import Transformers
from popsd_integrations.evaluate.settings import SamplingConfig
from popsd_integrations.miniature.tokenizer import build_tokenizer

pytest.importorskip("peft")

# adapter options, and how often the base is loaded: once where LoRA's matrices are all that was trained
ADAPTERS = {
    "matrices": ({}, 1),
    "head": ({"modules_to_save": ["lm_head"]}, 2),
    "norm": ({"modules_to_save": ["norm"]}, 2),
    "lora_only": ({"bias": "lora_only"}, 2),
    "all": ({"bias": "all"}, 2),
    "pissa": ({"init_lora_weights": "pissa"}, 2),
}


def save_trained(folder, base, options):
    """Every parameter that PEFT trains is moved, as training would."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base with biases, and one with a plain adapter beside it."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=32, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    base = save_model(folder / "base", AutoModelForCausalLM.from_config(config))
    return base, save_adapter(folder / "next", base, seed=3)


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_leaves_nothing_to_the_next(case, bases, tmp_path, monkeypatch):
    base, after = bases
    options, loads = ADAPTERS[case]
    leaking = save_trained(tmp_path / "leaking", base, options)
    config = SamplingConfig(model=str(base), temperature=0)
    checkpoints = resolve(config.model, [str(leaking), str(after)])

    def logits(engine, checkpoint):
        engine._switch(checkpoint)
        with torch.no_grad():
            return engine._model(torch.arange(8)[None]).logits

    alone = [logits(Transformers(config, build_tokenizer(), {}), checkpoint) for checkpoint in checkpoints]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], alone[2])
    loaded, load = [], Transformers._load
    monkeypatch.setattr(Transformers, "_load", lambda self, path: loaded.append(path) or load(self, path))
    engine = Transformers(config, build_tokenizer(), {})
    for place in (0, 1, 2, 0):
        assert torch.equal(logits(engine, checkpoints[place]), alone[place])
    assert len(loaded) == loads
