"""Which vocabulary entries of the target may move: edits of the difference teacher − reference before the sweeps.

The torch backend of ``popsd_kernels.sweeps.entry_masks``.
"""

from __future__ import annotations

import math

import torch

from popsd.engine.torch_backend.scratch import scratch
from popsd.engine.torch_backend.sweeps import normaliser
from popsd.engine.torch_backend.targets import tempered_logits
from popsd_kernels.rows import RowOptions


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


def tail_reach(tail_cap: float | None, pmi_clip: float | None) -> float | None:
    """How far Δ̄ may go so that |Δ̃| ≤ tail_cap: c·artanh(cap/c)."""
    return tail_cap if tail_cap is None or pmi_clip is None else pmi_clip * math.atanh(tail_cap / pmi_clip)
