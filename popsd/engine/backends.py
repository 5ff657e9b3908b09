"""Who computes the sweeps: the Triton kernels or the torch backend, behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from popsd.config import Impl
from popsd.engine.torch_backend import entry_masks, sweeps, targets
from popsd.engine.torch_backend.moments import row_moments
from popsd_kernels.rows import RowLoss, RowOptions, RowStatistics

SWEEP_ELEMENTS = 2 << 17
"""Elements per stream that a torch body sees at once: 1 MiB of float32, so that its seven temporaries stay in a shared cache
and the calls from Python (some 60 per block) cost less than 5 % of the matrix products."""


class Bodies(NamedTuple):
    """An implementation of the row sweeps, and how many elements a stream should have per call (None: a whole chunk).

    shared: arguments of `row_moments` and `row_sweeps` that both would otherwise derive from the student by themselves.
    """

    row_statistics: Callable[..., RowStatistics]
    row_sweeps: Callable[..., RowLoss]
    logit_difference: Callable[..., torch.Tensor]
    row_moments: Callable[..., torch.Tensor]
    entry_thresholds: Callable[..., torch.Tensor]
    mask_entries: Callable[..., None]
    shared: Callable[..., dict[str, Any]]
    sweep_elements: int | None


def resolve_impl(impl: Impl, device: torch.device) -> Impl:
    """AUTO: Triton on NVIDIA and AMD GPUs where Triton is installed, torch elsewhere. The others are themselves."""
    if impl is not Impl.AUTO:
        return impl
    return Impl.TRITON if device.type == "cuda" and find_spec("triton") is not None else Impl.TORCH


def bodies_for(impl: Impl) -> Bodies:
    if impl is Impl.TORCH:
        return Bodies(
            sweeps.row_statistics,
            sweeps.row_sweeps,
            targets.logit_difference,
            row_moments,
            entry_masks.entry_thresholds,
            entry_masks.mask_entries,
            _student_rows,
            SWEEP_ELEMENTS,
        )
    import popsd_kernels

    return Bodies(
        popsd_kernels.row_statistics,
        _two_sweeps,
        popsd_kernels.logit_difference,
        popsd_kernels.row_moments,
        popsd_kernels.entry_thresholds,
        popsd_kernels.mask_entries,
        lambda *_: {},
        None,
    )


def _student_rows(*student: Any) -> dict[str, Any]:
    return {"rows": sweeps.student_rows(*student)}


def _two_sweeps(
    student: torch.Tensor,
    target: torch.Tensor,
    delta: torch.Tensor | None,
    offset: torch.Tensor | None,
    *,
    token_ids: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    gradient: torch.Tensor | None,
    **common: Any,
) -> RowLoss:
    """Both Triton sweeps; a composed target takes the place of its difference between them. Few rows: several programs each."""
    from popsd_kernels import row_loss_gradient, row_split_sweeps, row_statistics
    from popsd_kernels.launch import too_few_rows

    options = common["options"]
    swept, split = sweep_bytes(options, delta is not None, gradient is not None)
    if not options.relative and too_few_rows(student.shape[0], swept, split, student.device):
        return row_split_sweeps(
            student, target, delta, offset, **common, token_ids=token_ids, row_scale=row_scale, gradient=gradient
        )
    statistics = row_statistics(student, target, delta, offset, **common, target_out=delta)
    return row_loss_gradient(
        student,
        target if delta is None else delta,
        statistics,
        **common,
        purified=delta is not None,
        token_ids=token_ids,
        row_scale=row_scale,
        gradient=gradient,
    )


def sweep_bytes(options: RowOptions, composed: bool, with_gradient: bool) -> tuple[int, int]:
    """Bytes per entry of float32 logits: of one program per row, and of several (kernels/README.md, §3)."""
    unclipped = options.entry_clip is None and options.token_clip is None
    one_read = options.beta == 0.0 and not options.relative and unclipped
    swept = (16 if composed else 8) + 8 + (2 + 8 * (not one_read)) * with_gradient
    streams = 12 if composed else 8
    return swept, 2 * streams + (streams + 2) * with_gradient
