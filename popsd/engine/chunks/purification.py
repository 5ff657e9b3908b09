"""What the purified target does to each token of a block, see `Purification`: in plain torch, whatever computes the loss."""

from __future__ import annotations

import torch

from popsd.config import Impl
from popsd.engine.backends import bodies_for
from popsd.engine.chunks.decomposition import DIAGNOSTIC_ELEMENTS
from popsd.engine.chunks.target import entry_mask
from popsd.engine.problem import Problem
from popsd.engine.sources import Chunk
from popsd.engine.torch_backend import scratch, targets
from popsd.engine.torch_backend.purification import movement_rows, size_rows
from popsd.engine.workspace import slices


def purification_rows(problem: Problem, chunk: Chunk) -> torch.Tensor:
    """The fields of `Purification`, [9, n] float32."""
    tokens, step = slice(0, chunk.student.shape[0]), max(1, DIAGNOSTIC_ELEMENTS // problem.vocab_size)
    return torch.cat([_few_rows(problem, chunk.rows(piece)) for piece in slices(tokens, step)], dim=1)


def _few_rows(problem: Problem, chunk: Chunk) -> torch.Tensor:
    options, scale = problem.row_options, problem.row_options.inv_temperature
    assert chunk.base is not None and chunk.teacher is not None and chunk.reference is not None
    base, teacher, difference, *free = scratch.scratch(chunk.base, 5, held=_BESIDE)
    for raw, out in ((chunk.base, base), (chunk.teacher, teacher)):
        targets.tempered_logits(raw, chunk.frozen_bias, options.target, options, out=out)
    mask = entry_mask(problem, bodies_for(Impl.TORCH), chunk)
    offset = targets.logit_difference(
        chunk.teacher,
        chunk.reference,
        out=difference,
        bias=chunk.frozen_bias,
        options=options,
        center=problem.options.center,
    )
    size = torch.mul(difference, scale, out=free[0]).sub_(offset[:, None]).abs_()
    sizes = size_rows(size, problem.options.pmi_clip)
    mask(difference, offset)
    target = targets.purified_shift(difference, offset, options, out=difference).add_(base)
    return torch.stack([*sizes, *movement_rows(base, teacher, target, *free)])


_BESIDE = scratch.HELD + scratch.DIFFERENCE
"""Scratch buffers that are taken while `logit_difference` runs."""
