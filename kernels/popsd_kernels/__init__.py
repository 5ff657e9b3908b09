"""Row-sweep kernels. Importing this package needs torch only; touching a launcher imports Triton."""

from __future__ import annotations

import importlib
from typing import Any

from popsd_kernels.options import LOGIT_FLOOR, LogitTransform, RowLoss, RowOptions, RowStatistics

__all__ = [
    "LOGIT_FLOOR",
    "LogitTransform",
    "RowLoss",
    "RowOptions",
    "RowStatistics",
    "entry_thresholds",
    "logit_difference",
    "mask_entries",
    "row_loss_gradient",
    "row_moments",
    "row_single_read",
    "row_split_sweeps",
    "row_statistics",
    "stream_divergence",
]

_LAUNCHERS = {
    "entry_thresholds": "popsd_kernels.masks",
    "mask_entries": "popsd_kernels.masks",
    "logit_difference": "popsd_kernels.difference",
    "row_statistics": "popsd_kernels.statistics",
    "row_loss_gradient": "popsd_kernels.loss_gradient",
    "row_moments": "popsd_kernels.decomposition",
    "row_single_read": "popsd_kernels.single_read",
    "row_split_sweeps": "popsd_kernels.few_rows",
    "stream_divergence": "popsd_kernels.streaming",
}


def __getattr__(name: str) -> Any:
    if name in _LAUNCHERS:
        return getattr(importlib.import_module(_LAUNCHERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
