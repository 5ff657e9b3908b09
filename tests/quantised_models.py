"""Tiny models whose linear layers bitsandbytes holds in 4 or 8 bits, and every bit of such a base."""

import os

import pytest
import torch

pytest.importorskip("bitsandbytes")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

QUANTISED = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    # as FSDP wants it: a packed weight has a floating dtype, and some of its bits are a NaN's
    "4 bits as float32": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float32},
    # with a threshold the columns of outliers are those of the batch, and a row's logits depend on the others
    "8 bits": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def quantisation(name, **options):
    return BitsAndBytesConfig(**(QUANTISED[name] | options))


def load(folder, name, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation(name, **options), device_map="cpu", dtype=dtype
    )


def base_bits(model):
    """Weights and quantisation scales under the adapter, by their names without it."""
    state = {name: x for name, x in model.state_dict().items() if "lora_" not in name}
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): x.clone() for name, x in state.items()}


def differing(one, other):
    """Names whose bits are not the same."""
    assert one.keys() == other.keys()
    pairs = {name: [x.detach().reshape(-1).view(torch.uint8) for x in (one[name], other[name])] for name in one}
    return [name for name, (x, y) in pairs.items() if not torch.equal(x, y)]
