"""Purification masks: which tokens the loss keeps, and which vocabulary entries of the target may move.

Token masks are functions of the [N] telemetry, so they are plain autograd after the operator: its per-token loss takes any
upstream gradient. Entry masks are edits of the difference teacher − reference before the sweeps, by a kernel of
`popsd_kernels.masks` or its torch body here: an entry that must not move gets the value that makes its Δ̄ zero, one that may
move little is clamped. So the sweeps need no option for them, and without masks nothing changes.
"""

from __future__ import annotations

import math
import warnings

import torch

from popsd.config import MaskConfig, PurifiedConfig
from popsd.torch_tiles import normaliser, scratch, tempered_logits
from popsd.types import Decomposition
from popsd_kernels.options import RowOptions


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
    do not count among those of which a top share is kept. What a rule needs must be given.
    """
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


def entry_thresholds(
    base: torch.Tensor | None,
    teacher: torch.Tensor | None,
    reference: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    options: RowOptions,
    plausibility: float | None = None,
    tail_floor: float | None = None,
) -> torch.Tensor:
    """The torch body of ``popsd_kernels.entry_thresholds``: [3, C] tempered logits below which a mask applies."""
    like = base if base is not None else teacher
    assert like is not None
    out = like.new_full((3, like.shape[0]), -torch.inf, dtype=torch.float32)
    z, free = scratch(like, 2)
    if base is not None and plausibility is not None:
        out[0] = tempered_logits(base, bias, options.target, options, out=z).amax(dim=1) + math.log(plausibility)
    for row, stream in ((1, teacher), (2, reference)):
        if stream is not None and tail_floor is not None:
            maximum, logsum = normaliser(tempered_logits(stream, bias, options.target, options, out=z), free)
            out[row] = maximum + logsum + math.log(tail_floor)
    return out


def mask_entries(
    delta: torch.Tensor,
    offset: torch.Tensor,
    thresholds: torch.Tensor,
    base: torch.Tensor | None,
    reference: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    options: RowOptions,
    tail_reach: float | None = None,
) -> None:
    """The torch body of ``popsd_kernels.mask_entries``: edits raw differences [C, V] in place."""
    gain = options.delta_scale * options.inv_temperature
    still, (implausible, faint_teacher, faint) = (offset / gain)[:, None], thresholds[:, :, None]
    z, free = scratch(delta, 2)
    if reference is not None and tail_reach is not None:
        tempered_logits(reference, bias, options.target, options, out=z)
        both = z < faint
        both &= z.add_(delta, alpha=gain) < faint_teacher
        reach = tail_reach / gain
        torch.where(both, torch.clamp(delta, still - reach, still + reach, out=free), delta, out=delta)
    if base is not None:
        below = tempered_logits(base, bias, options.target, options, out=z) < implausible
        torch.where(below, still, delta, out=delta)


def tail_reach(config: PurifiedConfig) -> float | None:
    """How far Δ̄ may go so that |Δ̃| ≤ tail_cap: c·artanh(cap/c)."""
    if config.tail_cap is None or config.pmi_clip is None:
        return config.tail_cap
    return config.pmi_clip * math.atanh(config.tail_cap / config.pmi_clip)


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
