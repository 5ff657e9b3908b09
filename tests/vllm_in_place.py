"""A model on the CPU in place of vLLM, for the trainer's tests: TRL's own code drives it."""

import copy
import sys
from types import SimpleNamespace

import torch
from trl.generation import vllm_generation
from trl.trainer import distillation_trainer
from trl_helpers import tiny


class InPlaceOfVLLM:
    """Loads what it is sent into a model of its own, strictly by name, and samples greedily from that."""

    def __init__(self, model):
        self.model, self.syncs, self.sampled = model.eval(), 0, []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        worker = SimpleNamespace(model_runner=runner)
        executor = SimpleNamespace(driver_worker=worker)
        config = SimpleNamespace(dtype=model.dtype, max_model_len=64, quantization=None)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=config)

    @torch.no_grad()
    def load(self, weights):
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    def reset_prefix_cache(self):
        self.syncs += 1

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        self.sampled += sampling_params
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids, tokens = list(prompt["prompt_token_ids"]), []
            while len(tokens) < params.max_tokens and not {*tokens[-1:]} & {*params.stop_token_ids}:
                tokens.append(int(self.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
            outputs.append(
                SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=tokens, logprobs=None)])
            )
        return outputs


def put_in_place(patch):
    """patch: a MonkeyPatch. Its trainers find `InPlaceOfVLLM` in ``vllm_generation.llm``."""

    def sampling(n=1, max_tokens=16, temperature=1.0, stop_token_ids=(), **others):
        return SimpleNamespace(max_tokens=max_tokens, stop_token_ids=stop_token_ids)

    model = tiny()  # built here, where DeepSpeed does not yet partition what is built

    def load(generation):
        generation.llm = InPlaceOfVLLM(copy.deepcopy(model).to(generation.model.dtype))

    patch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=sampling))
    patch.setattr(vllm_generation, "SamplingParams", sampling, raising=False)
    patch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
    patch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", load)
