"""Everything of TRL that is not its public interface, in one place, and the version check that guards it.

``PRIVATE`` is the contract: tests/integrations/trl_trainer/test_compat.py compares the installed TRL with it. Beside it the
trainer uses only the public ``DistillationTrainer`` and what ``transformers.Trainer`` documents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import trl
from packaging.version import Version
from transformers import Trainer

from popsd_integrations.huggingface.sampling import check_ends, unused_tokens

OLDEST, TOO_NEW = (1, 12), (1, 17)

PRIVATE = {
    "_set_signature_columns_if_needed": ["self"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_train_sampler": ["self", "dataset"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_prepare_inputs": ["self", "generation_batch"],
    "evaluation_loop": [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
}
"""Methods of DistillationTrainer that are overridden or relied on, with their parameters."""
GENERATED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch")
"""What ``_generate_and_score_completions`` returns at least. TRL shuffles and splits what else is in it: tensors along
their first dimension, and lists. It leaves 0-dim tensors alone."""


def require_supported(version: str) -> None:
    """Raise ImportError for a TRL that this trainer was not tested with."""
    if not OLDEST <= Version(version).release < TOO_NEW:
        needed = f"trl>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"
        raise ImportError(f"popsd works with {needed}, and trl {version} is installed: pip install '{needed}'.")


require_supported(trl.__version__)  # before any name that an older one does not have
DistillationConfig, DistillationTrainer = trl.DistillationConfig, trl.DistillationTrainer


class EpochSampler(torch.utils.data.Sampler[int]):
    """TRL's sampler, with the order of each epoch drawn from (seed, epoch).

    TRL draws the orders of all epochs from one generator, and a resumed run starts that generator again. After the first
    epoch it would see other data than the unbroken run. ``steps_done``: returns the optimiser steps taken so far.
    """

    def __init__(self, sampler: Any, steps_done: Callable[[], int]) -> None:
        self.sampler, self.steps_done = sampler, steps_done

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            steps_per_epoch = max(self.sampler.num_samples // self.sampler.batch_size, 1)
            self.sampler.generator.manual_seed(self.sampler.seed + self.steps_done() // steps_per_epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def accumulation_factor(trainer: Any) -> int:
    """The factor for a loss that is normalised over the whole accumulation already, before transformers' training step.

    That step divides the loss by the number of micro-batches once more, unless it is told not to. Since about 5.23
    ``loss_is_scaled_for_ga`` on the trainer tells it. Before, any ``compute_loss_func`` did, and TRL 1.12 to 1.14 set one.
    """
    told = hasattr(Trainer, "loss_is_scaled_for_ga") or trainer.compute_loss_func is not None
    return 1 if told else int(trainer.current_gradient_accumulation_steps)


def ends_of(trainer: Any) -> list[int]:
    """The tokens at which completions end. TRL before 1.15 knows the tokenizer's own alone."""
    return list(getattr(trainer, "eos_token_ids", [trainer.processing_class.eos_token_id]))


def suppress_unused_tokens(trainer: Any, vocab_size: int | None) -> None:
    """Let TRL sample no token of the head's padding, which begins at ``vocab_size``: see `unused_tokens`.

    vLLM has no list of tokens to suppress, but one of tokens to allow. Raises ValueError where no completion would end.
    """
    check_ends(ends_of(trainer), vocab_size)
    unused = unused_tokens(trainer.model, vocab_size)
    if not unused or vocab_size is None:
        return
    own = trainer.generation_config.suppress_tokens or []
    trainer.generation_config.suppress_tokens = sorted({*own, *unused})
    if trainer.use_vllm:
        allowed = trainer.vllm_generation.generation_kwargs.get("allowed_token_ids") or range(vocab_size)
        kept = {"allowed_token_ids": [token for token in allowed if token < vocab_size]}
        trainer.vllm_generation.generation_kwargs = trainer.vllm_generation.generation_kwargs | kept


@contextmanager
def generating(trainer: Any, *, greedy: bool = False, max_new_tokens: int | None = None) -> Iterator[None]:
    """Inside, TRL generates greedily, or so many tokens at most. None: as in training."""
    own = trainer.generation_config
    changed = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    trainer.generation_config = copy.deepcopy(own)
    trainer.generation_config.update(**changed | ({"do_sample": False} if greedy else {}))
    vllm = trainer.vllm_generation if trainer.use_vllm else None
    of_vllm = {} if vllm is None else {x: getattr(vllm, x) for x in ("max_completion_length", "generation_kwargs")}
    try:
        if vllm is not None:
            vllm.max_completion_length = max_new_tokens or vllm.max_completion_length
            vllm.generation_kwargs = (vllm.generation_kwargs or {}) | ({"temperature": 0.0} if greedy else {})
        yield
    finally:
        trainer.generation_config = own
        for name, value in of_vllm.items():
            setattr(vllm, name, value)


def record(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Add values to what TRL averages and logs at its next logging step, as train or eval metrics."""
    for name, value in metrics.items():
        trainer._metrics[_mode(trainer)][name].append(value)


def record_means(trainer: Any, sums: Mapping[str, tuple[float, float]]) -> None:
    """Add (sum, count) pairs to means over everything until the next logging step, however it is split into batches.

    They take the place of what TRL recorded under the same name, which is a mean of the batches' means.
    """
    metrics = trainer._metrics[_mode(trainer)]
    for name, (total, count) in sums.items():
        mean = metrics[name] if isinstance(metrics[name], _Mean) else _Mean()
        metrics[name] = mean.add(total, count)


def record_extreme(trainer: Any, name: str, value: float, better: Callable[[float, float], float]) -> None:
    """Add to a smallest or largest value (``better`` is min or max) as `record_means` does to a mean."""
    metrics = trainer._metrics[_mode(trainer)]
    seen = metrics[name][:1] if isinstance(metrics[name], _Extreme) else []
    metrics[name] = _Extreme([better(seen[0], value) if seen else value])


class _Extreme(list[float]):
    """The one value that TRL then takes the mean of."""


class _Mean(list[float]):
    """What TRL takes for its list of a metric's values, whose mean it logs: the one value Σ sums / Σ counts."""

    _sum = _items = 0.0

    def add(self, total: float, count: float) -> _Mean:
        self._sum, self._items = self._sum + total, self._items + count
        self[:] = [self._sum / self._items] if self._items > 0 else []
        return self


def take_eval_means(trainer: Any) -> dict[str, float]:
    """What was recorded in evaluation, averaged, and no longer there for TRL to log under the name of another dataset."""
    metrics = trainer._metrics["eval"]
    means = {name: sum(values) / len(values) for name, values in metrics.items() if values}
    metrics.clear()
    return means


def rows_of_data(trainer: Any, rows: int) -> int:
    """How many of this process's ``rows`` first rows are the data's own; in training all.

    So that all processes have equally many, accelerate fills an evaluation's last batch with rows that were there before.
    They come last in the order of the processes, and ``remainder`` counts those that do not.
    """
    state = trainer.accelerator.gradient_state
    if trainer.model.training or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return int(min(max(state.remainder - trainer.accelerator.process_index * rows, 0), rows))


def _mode(trainer: Any) -> str:
    return "train" if trainer.model.training else "eval"
