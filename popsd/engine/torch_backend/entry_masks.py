"""Which vocabulary entries of the target may move: edits of the difference teacher − reference before the sweeps.

The torch backend of ``popsd_kernels.sweeps.entry_masks``.
"""

from __future__ import annotations

import math

import torch

from popsd.engine.torch_backend.scratch import scratch
from popsd.engine.torch_backend.sweeps import normaliser
from popsd.engine.torch_backend.targets import tempered_logits
from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd_kernels.rows import EntryMasks, RowOptions, Rows


def entry_thresholds(rows: Rows, masks: EntryMasks, options: RowOptions, over: Vocabulary = WHOLE) -> torch.Tensor:
    """As ``popsd_kernels.entry_thresholds``: [3, C] tempered logits below which a mask applies."""
    out = rows.student.new_full((3, rows.student.shape[0]), -torch.inf, dtype=torch.float32)
    z, free = scratch(rows.student, 2)
    if rows.base is not None and masks.plausibility is not None:
        base = tempered_logits(rows.base, rows.frozen_bias, options.target, options, out=z)
        out[0] = over.max(base.amax(dim=1)) + math.log(masks.plausibility)
    for row, stream in ((1, rows.teacher), (2, rows.reference)):
        if stream is not None and masks.tail_floor is not None:
            tempered_logits(stream, rows.frozen_bias, options.target, options, out=z)
            maximum, logsum = normaliser(z, free, over)
            out[row] = maximum + logsum + math.log(masks.tail_floor)
    return out


def mask_entries(rows: Rows, thresholds: torch.Tensor, masks: EntryMasks, options: RowOptions) -> None:
    """As ``popsd_kernels.mask_entries``: edits ``rows.difference`` [C, V] in place."""
    delta, offset = rows.difference, rows.offset
    assert delta is not None and offset is not None
    gain = options.delta_scale * options.inv_temperature
    still, (implausible, faint_teacher, faint) = (offset / gain)[:, None], thresholds[:, :, None]
    z, free = scratch(delta, 2)
    if rows.reference is not None and masks.tail_reach is not None:
        tempered_logits(rows.reference, rows.frozen_bias, options.target, options, out=z)
        both = z < faint
        both &= z.add_(delta, alpha=gain) < faint_teacher
        reach = masks.tail_reach / gain
        torch.where(both, torch.clamp(delta, still - reach, still + reach, out=free), delta, out=delta)
    if rows.base is not None and masks.plausibility is not None:
        below = tempered_logits(rows.base, rows.frozen_bias, options.target, options, out=z) < implausible
        torch.where(below, still, delta, out=delta)


def tail_reach(tail_cap: float | None, pmi_clip: float | None) -> float | None:
    """How far Δ̄ may go so that |Δ̃| ≤ tail_cap: c·artanh(cap/c)."""
    return tail_cap if tail_cap is None or pmi_clip is None else pmi_clip * math.atanh(tail_cap / pmi_clip)
