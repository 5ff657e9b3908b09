"""Options of the plain loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real

from popsd import MaskConfig, PurifiedConfig, PurifiedOPSDLoss, TargetConfig
from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.groups import check_generations
from popsd_integrations.huggingface.objective import loss_function, target_config


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of ``train``; the defaults are the paper's, with one completion per question.

    steps, batch_size: optimiser steps, and completions per step, which all processes share. num_generations: completions of
        each question; a step takes batch_size / num_generations questions. micro_batch_size: rows per forward,
        None for all of a process; the result does not depend on it.
    lora_rank: None is full fine-tuning, which keeps a frozen copy of the weights.
    temperature: of sampling; 0 is greedy. loss_target: see ``huggingface.objective``, one's own among them; "contrastive_hints"
        wants prompts built with ``ContextConfig(reference="wrong_hint")``, and controls are contexts too, see
        ``ContextConfig``. target_parameters: the target's numbers by name.
        loss: its whole configuration instead; None is its own defaults.
    masks: which completion tokens the loss keeps; logged as kept_share. Under micro-batches a top share is of each.
    decompose_every: log Eq. 4 every so many steps, 0 never; β-OPSD has none. evaluate_every, checkpoint_every: steps, 0
        is at the end only.
    batched_frozen: run the frozen contexts as one batch. padding_free: run rows end to end (True), padded (False), or as costs
        least (None), see ``huggingface.exact_layout``. impl: backend of the loss, see ``popsd.Impl``.
    Raises ValueError for values out of range, and TypeError for what is no number or no whole number where one belongs.
    """

    steps: int = 200
    batch_size: int = 32
    num_generations: int = 1
    micro_batch_size: int | None = None
    learning_rate: float = 5e-6
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_rank: int | None = 64
    lora_alpha: int = 128
    lora_targets: str | tuple[str, ...] = "all-linear"
    max_new_tokens: int = 1024
    temperature: float = 1.0
    loss_target: str = "purified"
    target_parameters: dict[str, float] | None = None
    loss: PurifiedConfig | TargetConfig | None = None
    masks: MaskConfig | None = None
    markers: EpistemicMarkers = field(default_factory=EpistemicMarkers)
    decompose_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 50
    batched_frozen: bool = False
    padding_free: bool | None = None
    impl: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*_WHOLE, *_NUMBERS):
            value, kind = getattr(self, name), "whole number" if name in _WHOLE else "number"
            if value is None and name in _OR_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral if name in _WHOLE else Real):
                raise TypeError(f"{name}: expected a {kind}{' or None' * (name in _OR_NONE)}; got {value!r}.")
        if self.padding_free not in (None, True, False):
            raise TypeError(f"padding_free: expected True, False or None; got {self.padding_free!r}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name}: expected a number of at least {least}; got {value}.")
        check_generations(self.num_generations, self.batch_size, "batch_size")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number; got {getattr(self, name)}.")
        if self.loss is None:
            object.__setattr__(self, "loss", target_config(self.loss_target, self.target_parameters))
        elif self.target_parameters and self.loss != target_config(self.loss_target, self.target_parameters):
            raise ValueError(
                f"target_parameters: expected None beside loss, which has them; got {self.target_parameters}."
            )
        self.loss_function()
        if not all(0 <= beta < 1 for beta in self.adam_betas) or len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas: expected two numbers in [0, 1); got {self.adam_betas}.")

    def loss_function(self) -> PurifiedOPSDLoss:
        return loss_function(self.loss_target, self.loss, masks=self.masks, impl=self.impl)


_OR_NONE = ("micro_batch_size", "lora_rank")
_WHOLE = (
    "steps",
    "batch_size",
    "num_generations",
    "max_new_tokens",
    "decompose_every",
    "evaluate_every",
    "checkpoint_every",
    "seed",
    *_OR_NONE,
)
_NUMBERS = ("learning_rate", "weight_decay", "max_grad_norm", "lora_alpha", "temperature")
_LEAST = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "lora_rank": 1, "lora_alpha": 1, "max_new_tokens": 1}
_LEAST |= dict.fromkeys(("temperature", "weight_decay", "decompose_every", "evaluate_every", "checkpoint_every"), 0)
