"""Kernels for the loss of Purified On-Policy Self-Distillation. Importing this needs torch only; a launcher needs Triton.

A kernel in twenty lines, on a GPU or in Triton's interpreter:

    import os
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first launcher is imported
    from popsd_kernels import RowOptions, Rows, row_loss_gradient, row_statistics

    student, base, teacher, reference = torch.randn(4, 8, 1000, device=device)  # logits [C, V] of 8 tokens
    difference = teacher - reference
    rows = Rows(student, base=base, difference=difference, offset=difference.mean(dim=1))
    options = RowOptions(beta=0.5, pmi_beta=1.0, pmi_clip=10.0)

    statistics = row_statistics(rows, options, target_out=difference)  # sweep 1; the purified target's logits
    gradient = torch.empty_like(student)
    loss = row_loss_gradient(rows.with_target(difference), statistics, options, gradient=gradient)  # sweep 2
    print(loss.divergence.mean())  # nats per token; ``gradient`` is d divergence / d student

    student.requires_grad_()
    log_p, log_q = student.log_softmax(1), difference.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    ((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() / 2).backward()
    print((gradient - student.grad).abs().max())  # 1e-8 or so

Every launcher takes a `Rows`, which says what to read, and a `RowOptions`, which says what to compute. What it refuses it
refuses before any launch. ``python -m popsd_kernels.aot`` compiles the kernels for GPUs that are not there.
"""

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


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAUNCHERS:
        try:
            return getattr(importlib.import_module(_LAUNCHERS[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            text = (
                f"popsd_kernels: {name} needs Triton, got none; pip install triton, or a torch that brings it (Linux)"
            )
            raise ModuleNotFoundError(text, name="triton") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
