"""Everything of TRL that is not its public interface, in one place, and the version check that guards it.

``PRIVATE`` is the contract: tests/test_trl_compat.py holds the installed TRL to it, on every supported version. Beside it
the trainer touches only the public ``DistillationTrainer`` and what ``transformers.Trainer`` documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import trl
from packaging.version import Version
from torch import nn
from transformers import Trainer

OLDEST, TOO_NEW = (1, 12), (1, 17)

PRIVATE = {
    "_set_signature_columns_if_needed": ["self"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_train_sampler": ["self", "dataset"],
    "_tokenize_prompts": ["self", "prompts"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
}
"""Methods of DistillationTrainer that are overridden or relied on, with their parameters."""
GENERATED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch")
"""What ``_generate_and_score_completions`` returns at least. TRL shuffles and splits along the first dimension what else
is in it, and leaves 0-dim tensors alone."""

T = TypeVar("T")


def require_supported(version: str) -> None:
    """Raise ImportError, in one sentence, for a TRL that this trainer was not tested with."""
    if not OLDEST <= Version(version).release < TOO_NEW:
        needed = f"trl>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"
        raise ImportError(
            f"popsd's trainer works with {needed}, and trl {version} is installed: pip install '{needed}'."
        )


require_supported(trl.__version__)  # before any name that an older one does not have
DistillationConfig, DistillationTrainer = trl.DistillationConfig, trl.DistillationTrainer


def run_in_forward(wrapper: nn.Module, inner: nn.Module, function: Callable[[], T]) -> T:
    """Call ``function`` as the forward of ``wrapper`` (DDP, FSDP, or the model itself), and return its result.

    Those reduce gradients and gather shards only for what runs inside their forward. ``inner`` is the module that
    ``wrapper`` calls in the end. Autocast that accelerate put on ``inner.forward`` is not entered: do it in ``function``.
    """
    own = inner.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    def once(*_: Any, **__: Any) -> T:
        restore()  # function may want the real forward
        return function()

    inner.forward = once
    try:
        result: T = wrapper()
    finally:
        restore()
    return result


class EpochSampler(torch.utils.data.Sampler[int]):
    """TRL's sampler, its order drawn from (seed, epoch).

    TRL draws the orders of all epochs from one running generator, which a resumed run starts again: after the first epoch
    it would see other data than the unbroken run. ``steps_done``: returns the optimiser steps taken so far.
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
    """What a loss that is normalised over the whole accumulation is multiplied by, before transformers' training step.

    That divides it by the number of micro-batches once more, unless told not to: since 5.23 or so by
    ``loss_is_scaled_for_ga`` on the trainer, before by any ``compute_loss_func``, which TRL 1.12 to 1.14 set for that.
    """
    told = hasattr(Trainer, "loss_is_scaled_for_ga") or trainer.compute_loss_func is not None
    return 1 if told else int(trainer.current_gradient_accumulation_steps)


def record(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Add values to what TRL averages and logs at the next logging step, as train or eval metrics."""
    mode = "train" if trainer.model.training else "eval"
    for name, value in metrics.items():
        trainer._metrics[mode][name].append(value)


def left_padded(rows: Iterable[list[int]], padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, [B, L] int64 each."""
    tensors = [torch.tensor(row) for row in rows]
    ids, mask = (
        nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=value, padding_side="left").to(device)
        for x, value in ((tensors, padding), ([torch.ones_like(x) for x in tensors], 0))
    )
    return ids, mask
