"""Which tokens the loss keeps: weights from the per-token results, as plain autograd after the operator."""

from __future__ import annotations

import warnings

import torch

from popsd.config import MaskConfig
from popsd.outputs import Decomposition


def token_weights(
    config: MaskConfig,
    *,
    student_entropy: torch.Tensor,
    target_entropy: torch.Tensor,
    decomposition: Decomposition | None = None,
    token_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of all rules, float32 in [0, 1] and of the shape of the entropies. See `MaskConfig`.

    token_ids: sampled tokens. positions: int64 place of each token in its completion, from 0. weights: tokens of weight 0
    do not count among those of which a top share is kept. What a rule needs must be given, or a ValueError names it.
    """
    if not isinstance(config, MaskConfig):
        raise TypeError(f"config: expected a popsd.MaskConfig; got {type(config).__name__}.")
    given = {"decomposition": decomposition, "positions": positions, "token_ids": token_ids}
    needed = {
        "decomposition": config.reads_decomposition,
        "positions": config.skip_first,
        "token_ids": config.protect_ids,
    }
    for name, need in needed.items():
        if need and given[name] is None:
            raise ValueError(f"{name}: expected, since a rule of the masks reads it; got None.")
    result = torch.ones_like(student_entropy)
    entropies = {"student_entropy": student_entropy, "target_entropy": target_entropy}
    for name, entropy in entropies.items():
        least, share = getattr(config, f"min_{name}"), getattr(config, f"top_{name}")
        if least is not None:
            result = result * _step(entropy - least, config)
        if share is not None:
            counted = torch.ones_like(entropy, dtype=torch.bool) if weights is None else weights != 0
            result = result * _step(entropy - _lowest_of_top(entropy, counted, share), config)
    if config.reads_decomposition:
        assert decomposition is not None
        prefix = "" if config.signal == "raw" else f"{config.signal}_"
        if config.max_reference_fraction is not None:
            fraction = getattr(decomposition, f"{prefix}reference_fraction")
            result = result * _step(config.max_reference_fraction - fraction, config)
        if config.min_cos_transferable is not None:
            cosine = getattr(decomposition, f"{prefix}cos_total_transferable")
            result = result * _step(cosine - config.min_cos_transferable, config)
    if config.skip_first:
        assert positions is not None
        result = result * _floored((positions >= config.skip_first).float(), config)
    if config.protect_ids:
        assert token_ids is not None
        protected = torch.stack([token_ids == token for token in config.protect_ids]).any(dim=0)
        result = result * _floored((~protected).float(), config)
    return result


def warn_if_nothing_is_kept(masked: torch.Tensor, weights: torch.Tensor) -> None:
    """Where looking is free: a warning, which Python shows once, if masks leave no token of those that counted."""
    if weights.any() and not masked.any():
        warnings.warn(
            f"masks: none of the {int((weights != 0).sum())} tokens is kept (kept share 0.000), so this loss is 0. Loosen "
            "the thresholds, set floor above 0, or drop a rule; popsd.decompose shows what the thresholds meet.",
            stacklevel=2,
        )


def _step(excess: torch.Tensor, config: MaskConfig) -> torch.Tensor:
    """1 where a token passes by ``excess`` ≥ 0, the floor where not; a logistic step of that width where soft."""
    passed = (excess >= 0).float() if config.softness == 0 else torch.sigmoid(excess / config.softness)
    return _floored(passed, config)


def _floored(passed: torch.Tensor, config: MaskConfig) -> torch.Tensor:
    return config.floor + (1.0 - config.floor) * passed


def _lowest_of_top(values: torch.Tensor, counted: torch.Tensor, share: float) -> torch.Tensor:
    """The ⌈share·count⌉-th largest of the counted values, a 0-dim tensor, without looking at any on the host."""
    if values.numel() == 0:
        return values.new_zeros(())
    ordered = values.masked_fill(~counted, -torch.inf).flatten().sort(descending=True).values
    place = torch.ceil(share * counted.sum().double() - 1e-9).long() - 1  # share·count is rarely exact in binary
    return ordered.gather(0, place.clamp_min(0)[None])[0]
