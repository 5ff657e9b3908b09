"""Kernels for the loss of Purified On-Policy Self-Distillation. Importing them needs torch only; a launcher needs Triton."""

from __future__ import annotations

import importlib
from typing import Any

from popsd_kernels.rows import (
    LOGIT_FLOOR,
    Composed,
    EntryMasks,
    Gradients,
    Heads,
    LogitTransform,
    RowLoss,
    RowOptions,
    Rows,
    RowStatistics,
)

__all__ = [
    "LOGIT_FLOOR",
    "Composed",
    "EntryMasks",
    "Gradients",
    "Heads",
    "LogitTransform",
    "RowLoss",
    "RowOptions",
    "RowStatistics",
    "Rows",
    "entry_thresholds",
    "logit_difference",
    "mask_entries",
    "row_loss_gradient",
    "row_moments",
    "row_single_read",
    "row_split_sweeps",
    "row_statistics",
    "shard_moments",
    "stream_divergence",
]

_LAUNCHERS = {
    "entry_thresholds": "popsd_kernels.sweeps.entry_masks",
    "mask_entries": "popsd_kernels.sweeps.entry_masks",
    "logit_difference": "popsd_kernels.sweeps.difference",
    "row_statistics": "popsd_kernels.sweeps.statistics",
    "row_loss_gradient": "popsd_kernels.sweeps.loss_gradient",
    "row_moments": "popsd_kernels.sweeps.moments",
    "shard_moments": "popsd_kernels.sweeps.moments",
    "row_single_read": "popsd_kernels.sweeps.single_read",
    "row_split_sweeps": "popsd_kernels.sweeps.few_rows",
    "stream_divergence": "popsd_kernels.streaming.loss",
}


def __getattr__(name: str) -> Any:
    if name in _LAUNCHERS:
        return getattr(importlib.import_module(_LAUNCHERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
