"""What Unsloth's code for GPUs does to a model and to TRL's trainer, on a CPU: a process of its own, which prints JSON.

``UNSLOTH_ALLOW_CPU`` chooses that code where there is no GPU. It leaves out the writing of trainers, which is asked for here.
Triton interprets the kernels. What asks CUDA for a device is answered: number 0, and the CPU.
"""
# ruff: noqa: E402

import json
import os
import sys

path, folder = sys.argv[1:]
os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1", "UNSLOTH_COMPILE_LOCATION": f"{folder}/compiled"}

import unsloth.kernels.rope_embedding
import unsloth.models._utils
import unsloth.models.llama
from unsloth.models import rl
from unsloth.models.qwen3 import FastQwen3Model

rl._patch_trl_rl_trainers("distillation_trainer")

import torch
import trl
from framework_helpers import train
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from popsd_integrations import huggingface as hf


class Device(str):
    def __index__(self):
        return 0


class OneDevice(list):
    def __getitem__(self, index):
        return super().__getitem__(0)

    def __setitem__(self, index, value):
        super().__setitem__(0, value)


def with_unsloths_forwards():
    for module in (unsloth.models.llama, unsloth.models._utils):
        module.get_current_device = lambda: Device("cpu")
        module.DEVICE_COUNT = 1
    unsloth.kernels.rope_embedding._eviction_hints_ok = lambda device: False
    FastQwen3Model.pre_patch()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.max_seq_length = model.model.max_seq_length = 256
    for layer in model.model.layers:
        layer.self_attn.apply_qkv = unsloth.models.llama.original_apply_qkv
        layer.self_attn.apply_o = unsloth.models.llama.original_apply_o
    model.model.rotary_emb.multi_gpu_cos_cached = OneDevice([None])
    model.model.rotary_emb.multi_gpu_sin_cached = OneDevice([None])
    return model


def trained():
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, _ = train(f"{folder}/run", get_peft_model(plain, lora))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"trainer": trl.DistillationTrainer.__name__, "losses": losses}


@torch.no_grad()
def padded():
    """How far the states of padded rows in training are from those of each row alone in evaluation."""
    model = with_unsloths_forwards()
    prompts, completions = [[1, 2, 3, 4, 5, 6], [7, 8]], [[9, 10], [11, 12, 13]]
    together = hf.pack(prompts, completions, pad_token_id=256)
    alone = [hf.pack([x], [y], pad_token_id=256) for x, y in zip(prompts, completions, strict=True)]

    def states(packed):
        found = hf.hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
        return packed.predicting(found)[packed.completion_mask]

    model.eval()
    expected = torch.cat([states(packed) for packed in alone])
    model.train()
    ours = states(together)
    model.model._unsloth_keep_padding_mask = False
    inputs = {"input_ids": together.input_ids, "position_ids": together.position_ids, "use_cache": False}
    own = model.model(**inputs, attention_mask=together.attention_mask)[0]
    own = together.predicting(own)[together.completion_mask]
    errors = [((x - expected).abs().max() / expected.abs().max()).item() for x in (ours, own)]
    return model, dict(zip(("error", "error_of_its_own"), errors, strict=True))


found = trained()
model, errors = padded()
side = hf.check_model(model, (), hf.frozen_weights(model), pad_token_id=256)
print(json.dumps(found | errors | {"side": side, "forward": type(model.model).forward.__name__}))
