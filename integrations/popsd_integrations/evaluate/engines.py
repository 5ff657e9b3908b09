"""Who generates: transformers, or vLLM. Both take token ids, and nothing of the model's own sampling settings applies.

An engine holds one set of weights at a time. Adapters are applied to the base model without being merged into it, because
merging in bfloat16 loses part of a small update and does not give the base weights back. Where an adapter changes weights
of the base all the same, as trained biases, whole modules or PiSSA do, the base is loaded again behind it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from popsd_integrations.evaluate.checkpoints import BASE, Checkpoint, base_config
from popsd_integrations.evaluate.settings import SamplingConfig

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of an adapter."""


class Request(NamedTuple):
    """samples completions of one prompt. seed: of this request; vLLM samples by it."""

    prompt: list[int]
    samples: int
    seed: int


class Completion(NamedTuple):
    """tokens: how many, the end of sequence included. finish: "stop" or "length"."""

    text: str
    tokens: int
    finish: str


def completion(tokenizer: Any, ids: Sequence[int], stopped: bool) -> Completion:
    """A completion of token ids, the same for every engine."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return Completion(text, len(ids), "stop" if stopped else "length")


class Engine(Protocol):
    """Generates with one checkpoint at a time."""

    def generate(self, checkpoint: Checkpoint, requests: Sequence[Request], seed: int) -> list[list[Completion]]:
        """Completions of each request. seed: of the whole call; transformers samples by it."""
        ...


def check_engine(config: SamplingConfig, checkpoints: Sequence[Checkpoint], longest_prompt: int) -> None:
    """Raise ImportError where the engine is missing, and ValueError for what it cannot run. Loads no weights."""
    from popsd_integrations.huggingface.heads import without_weights
    from popsd_integrations.huggingface.sampling import position_limit

    if find_spec(config.engine) is None:
        raise ValueError(
            f"use_vllm: expected an engine that is installed; {config.engine} is not: pip install {config.engine}, in an "
            "environment of its own where its torch is another one."
        )
    if any(checkpoint.adapter for checkpoint in checkpoints) and find_spec("peft") is None:
        raise ImportError("adapters need peft.", name="peft")
    limit = position_limit(without_weights(base_config(config.model)))
    if limit is not None and longest_prompt + config.max_completion_length > limit:
        raise ValueError(
            f"max_completion_length: expected at most {limit - longest_prompt} for {config.model}, which has {limit} positions "
            f"and a prompt of {longest_prompt} tokens; got {config.max_completion_length}."
        )
    if config.engine == "vllm":
        for checkpoint in checkpoints:
            _check_adapter_for_vllm(checkpoint)


def _check_adapter_for_vllm(checkpoint: Checkpoint) -> None:
    adapter = checkpoint.adapter or {}
    found = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if adapter.get(name)]
    found += ["bias"] if adapter.get("bias", "none") != "none" else []
    if found:
        raise ValueError(
            f"use_vllm: expected adapters of LoRA alone, which is what vLLM applies; {checkpoint.path} has "
            f"{', '.join(found)}. Leave use_vllm out, or merge the adapter and pass the whole model."
        )


def make_engine(
    config: SamplingConfig, checkpoints: Sequence[Checkpoint], tokenizer: Any, options: dict[str, Any], length: int
) -> Engine:
    """The engine that ``config`` names. options: for ``from_pretrained`` or ``vllm.LLM``. length: longest prompt."""
    if config.engine == "vllm":
        return VLLM(config, checkpoints, tokenizer, options, length)
    return Transformers(config, tokenizer, options)


class Transformers:
    """``model.generate``, the rows of a batch at once, on the GPU where there is one."""

    def __init__(self, config: SamplingConfig, tokenizer: Any, options: dict[str, Any]) -> None:
        self.config, self.tokenizer, self.options = config, tokenizer, {"dtype": "auto", **options}
        self._base: Any = None
        self._model: Any = None
        self._label: str | None = None
        self._untouched: Any = None

    def _load(self, path: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, **self.options)
        if "device_map" not in self.options:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval()

    def _switch(self, checkpoint: Checkpoint) -> None:
        if self._label == checkpoint.label:
            return
        if hasattr(self._model, "peft_config"):
            self._base = self._model.unload()  # leaves trained biases and whole modules in the base
            if _state(self._base) != self._untouched:
                self._base = None
        self._model = None
        if checkpoint.adapter is None and checkpoint.label != BASE:
            self._base = None  # before the next one, or both would be in memory
            self._model = self._load(checkpoint.path)
        else:
            self._base = self._model = self._base or self._load(self.config.model)
        if checkpoint.adapter is not None:
            from peft import PeftModel

            self._untouched = _state(self._base)
            self._model = PeftModel.from_pretrained(self._base, checkpoint.path).eval()
        self._label = checkpoint.label

    def generate(self, checkpoint: Checkpoint, requests: Sequence[Request], seed: int) -> list[list[Completion]]:
        import torch

        from popsd_integrations.huggingface.sampling import hf_generate, special_tokens

        self._switch(checkpoint)
        ends, pad = special_tokens(self._model, self.tokenizer)
        prompts = [request.prompt for request in requests for _ in range(request.samples)]
        config = self.config
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = hf_generate(
                self._model,
                prompts,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                eos_token_id=ends,
                pad_token_id=pad,
                top_p=config.top_p,
                top_k=config.top_k,
            )
        made = iter(completion(self.tokenizer, row, row[-1] in ends) for row in rows)
        return [[next(made) for _ in range(request.samples)] for request in requests]


def _state(model: Any) -> dict[str, object]:
    """What changes whenever a parameter or buffer of a model is replaced, written to, or held by another module.

    A tensor on the meta device, whose values are elsewhere, is never equal to itself: it cannot be seen whether they changed.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        name: object() if tensor.is_meta else (tensor.data_ptr(), tensor.shape, tensor._version)
        for name, tensor in tensors.items()
    }


class VLLM:
    """vLLM offline, the samples of a request by its own ``n``, adapters by ``LoRARequest``."""

    def __init__(
        self,
        config: SamplingConfig,
        checkpoints: Sequence[Checkpoint],
        tokenizer: Any,
        options: dict[str, Any],
        length: int,
    ) -> None:
        ranks = [
            rank
            for checkpoint in checkpoints
            if checkpoint.adapter
            for rank in (checkpoint.adapter["r"], *checkpoint.adapter.get("rank_pattern", {}).values())
        ]
        lora: dict[str, Any] = {}
        if ranks:
            lora = {"enable_lora": True, "max_lora_rank": min(rank for rank in VLLM_RANKS if rank >= max(ranks))}
        self.config, self.tokenizer = config, tokenizer
        self.options = {"max_model_len": length + config.max_completion_length, "seed": config.seed}
        self.options |= lora | options
        self.adapters = {x.label: number for number, x in enumerate(checkpoints, start=1) if x.adapter}
        self._engine: Any = None
        self._path: str | None = None

    def _switch(self, path: str) -> Any:
        if self._path != path:
            from vllm import LLM

            self._engine = None
            gc.collect()  # vLLM frees the GPU when its engine is collected
            self._engine, self._path = LLM(model=path, tokenizer=self.config.model, **self.options), path
        return self._engine

    def generate(self, checkpoint: Checkpoint, requests: Sequence[Request], seed: int) -> list[list[Completion]]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        config, adapter = self.config, self.adapters.get(checkpoint.label)
        engine = self._switch(checkpoint.path if adapter is None else config.model)
        params = [
            SamplingParams(
                n=request.samples,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                max_tokens=config.max_completion_length,
                seed=request.seed,
                detokenize=False,  # its text may begin with a space where the tokenizer's own does not
            )
            for request in requests
        ]
        lora = None if adapter is None else LoRARequest(checkpoint.label, adapter, checkpoint.path)
        outputs = engine.generate(
            [{"prompt_token_ids": request.prompt} for request in requests], params, lora_request=lora
        )
        return [
            [
                completion(self.tokenizer, x.token_ids, x.finish_reason == "stop")
                for x in sorted(row.outputs, key=lambda x: x.index)
            ]
            for row in outputs
        ]
