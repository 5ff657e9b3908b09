"""What the purified target does to each token of a block, see `Purification`: in plain torch, whatever computes the loss."""

from __future__ import annotations

import torch

from popsd.engine.backends import TorchBackend
from popsd.engine.chunks.decomposition import DIAGNOSTIC_ELEMENTS
from popsd.engine.chunks.target import entry_mask
from popsd.engine.problem import Problem
from popsd.engine.torch_backend import scratch, targets
from popsd.engine.torch_backend.purification import movement_rows, size_rows
from popsd.engine.workspace import slices
from popsd_kernels.rows import Rows


def purification_rows(problem: Problem, rows: Rows) -> torch.Tensor:
    """The fields of `Purification`, [9, n] float32."""
    tokens, step = slice(0, rows.student.shape[0]), max(1, DIAGNOSTIC_ELEMENTS // problem.planned_vocab_size)
    return torch.cat([_few_rows(problem, rows.part(piece)) for piece in slices(tokens, step)], dim=1)


def _few_rows(problem: Problem, rows: Rows) -> torch.Tensor:
    options, scale, over = problem.row_options, problem.row_options.inv_temperature, problem.vocabulary
    backend = TorchBackend(over)
    assert rows.base is not None and rows.teacher is not None and rows.reference is not None
    base, teacher, difference, *free = scratch.scratch(rows.base, 5, held=_BESIDE)
    for raw, out in ((rows.base, base), (rows.teacher, teacher)):
        targets.tempered_logits(raw, rows.frozen_bias, options.target, options, out=out)
    mask = entry_mask(problem, backend, rows)
    offset = backend.logit_difference(rows, options, center=problem.options.center, out=difference)
    size = torch.mul(difference, scale, out=free[0]).sub_(offset[:, None]).abs_()
    sizes = size_rows(size, problem.options.pmi_clip, over)
    mask(rows._replace(difference=difference, offset=offset))
    target = targets.purified_shift(difference, offset, options, out=difference).add_(base)
    return torch.stack([*sizes, *movement_rows(base, teacher, target, free[0], free[1], over)])


_BESIDE = scratch.HELD + scratch.DIFFERENCE
"""Scratch buffers that are taken while `logit_difference` runs."""
