"""TRL's ``VLLMGeneration`` with the weights of `StudentWeights` in place of its own, which it merges in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from transformers import TrainerCallback

from popsd_integrations.huggingface.distributed import agreed
from popsd_integrations.huggingface.frozen import has_adapter
from popsd_integrations.trl_trainer.compat import ends_of, record
from popsd_integrations.trl_trainer.vllm.options import check_sampling
from popsd_integrations.trl_trainer.vllm.seeds import seed_each
from popsd_integrations.trl_trainer.vllm.weights import StudentWeights, check_weights


def send_student(trainer: Any, needed: int | None) -> None:
    """Let the ``vllm_generation`` of a ``trl.DistillationTrainer`` send the student's weights and leave the model alone.

    needed: the longest question and completion together, in tokens, where it is known.
    TRL's ``sync_weights`` stays, in both modes: waking, announcing, loading, the prefix cache. It takes its tensors from
    ``_iter_named_params``, which is replaced on the instance, but under FSDP1, where its own walk stays. In training of an
    adapter ``vllm_rounding`` is logged, which is `StudentWeights.rounding`.
    Completions end at the tokens at which the trainer cuts them, and each has its seed. Weights are sent anew wherever
    ``train`` begins or ends.
    Raises ValueError for weights that cannot be sent exactly, for sampling options that vLLM has not, and for a server
    that is quantised or takes fewer tokens than ``needed``.
    """
    generation, parallel = trainer.vllm_generation, trainer.vllm_generation._dist
    check_weights(trainer.model, parallel.fsdp_version)
    check_sampling(generation.generation_kwargs)
    engine = _engine(generation)
    check_engine(engine, needed)
    set_seed(trainer.args.seed, device_specific=True)  # as TRL does before it builds vLLM, which seeds torch by itself
    seed_each(generation)
    generation.generation_kwargs = generation.generation_kwargs | {"stop_token_ids": ends_of(trainer)}
    trainer.add_callback(SendAnew(trainer))
    if parallel.fsdp_version == 1:
        return
    device = trainer.accelerator.device if parallel.is_fsdp else None
    weights = StudentWeights(generation.model, parallel.gather_params, device, engine.dtype)

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights
        if trainer.model.training and has_adapter(trainer.model):
            record(trainer, {"vllm_rounding": weights.rounding})

    generation._iter_named_params = named


class Engine(NamedTuple):
    """What vLLM has decided. dtype: what it computes in."""

    dtype: torch.dtype
    max_model_len: int
    quantization: str | None


def _engine(generation: Any) -> Engine:
    """Of the engine in this process, or of the server, which the first process asks."""
    if generation.mode == "colocate":
        config = generation.llm.llm_engine.model_config
        return Engine(config.dtype, config.max_model_len, config.quantization)

    def asked() -> Engine:
        client = generation.vllm_client
        answer = client.session.get(f"{client.base_url}/server_info", params={"config_format": "json"})
        answer.raise_for_status()
        config = answer.json()["vllm_config"]["model_config"]
        dtype = getattr(torch, config["dtype"].removeprefix("torch."))
        return Engine(dtype, config["max_model_len"], config["quantization"])

    return agreed(asked)


def check_engine(engine: Engine, needed: int | None) -> None:
    """Raise ValueError for an engine that would not sample from the student, or cut its completions short."""
    if engine.quantization is not None:
        raise ValueError(
            f"vllm_mode: expected a server whose weights are not quantised; got {engine.quantization!r}. It would quantise "
            "the student's again, and sample from others. Start it without --quantization, from weights in bfloat16."
        )
    if needed is not None and engine.max_model_len < needed:
        raise ValueError(
            f"vllm_mode: expected a server that takes {needed} tokens, the longest question and completion; got "
            f"{engine.max_model_len}. Start it with --max-model-len {needed}."
        )


class SendAnew(TrainerCallback):
    """TRL sends weights when the number of steps has changed. A checkpoint that is loaded changes them, and not always that."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._last_loaded_step = -1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After ``load_best_model_at_end``."""
        self._trainer._last_loaded_step = -1
