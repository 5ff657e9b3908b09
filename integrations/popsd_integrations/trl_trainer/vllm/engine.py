"""TRL's ``VLLMGeneration`` with the weights of `StudentWeights` in place of its own, which it merges in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from popsd_integrations.huggingface.frozen import has_adapter
from popsd_integrations.trl_trainer.compat import ends_of, record
from popsd_integrations.trl_trainer.vllm.options import check_sampling
from popsd_integrations.trl_trainer.vllm.weights import StudentWeights, check_weights


def send_student(trainer: Any) -> None:
    """Let the ``vllm_generation`` of a ``trl.DistillationTrainer`` send the student's weights and leave the model alone.

    TRL's ``sync_weights`` stays, in both modes: waking, announcing, loading, the prefix cache. It takes its tensors from
    ``_iter_named_params``, which is replaced on the instance. In training ``vllm_rounding`` is logged, which is
    `StudentWeights.rounding`. Without an adapter TRL merges nothing, and its own walk stays.
    Completions end at the tokens at which the trainer cuts them. Weights are sent anew wherever ``train`` begins or ends.
    Raises ValueError for weights that cannot be sent exactly, and for sampling options that vLLM has not.
    """
    generation, parallel = trainer.vllm_generation, trainer.vllm_generation._dist
    check_weights(trainer.model, parallel.fsdp_version)
    check_sampling(generation.generation_kwargs)
    generation.generation_kwargs = generation.generation_kwargs | {"stop_token_ids": ends_of(trainer)}
    trainer.add_callback(SendAnew(trainer))
    if not has_adapter(trainer.model):
        return
    device = trainer.accelerator.device if parallel.is_fsdp else None
    # vLLM computes a float32 model in bfloat16 unless it is told otherwise, which TRL does not.
    dtype = generation.llm.llm_engine.model_config.dtype if generation.mode == "colocate" else None
    weights = StudentWeights(generation.model, parallel.gather_params, device, dtype)

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights
        if trainer.model.training:
            record(trainer, {"vllm_rounding": weights.rounding})

    generation._iter_named_params = named


class SendAnew(TrainerCallback):
    """TRL sends weights when the number of steps has changed. A checkpoint that is loaded changes them, and not always that."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._last_loaded_step = -1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After ``load_best_model_at_end``."""
        self._trainer._last_loaded_step = -1
