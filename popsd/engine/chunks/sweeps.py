"""Loss and gradient of a block of tokens, by the strategy asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from popsd.config import Strategy
from popsd.engine.backends import Bodies
from popsd.engine.chunks.registry import registered_target
from popsd.engine.chunks.target import form_difference
from popsd.engine.problem import Problem
from popsd.engine.sources import Chunk, ProjectedStreams
from popsd_kernels.rows import LogitTransform, RowLoss


def sweep(
    problem: Problem, backend: Bodies, chunk: Chunk, gradient: torch.Tensor | None, shared: dict[str, Any]
) -> RowLoss:
    """Per-token results; into ``gradient`` [n, V], d Σ row_scale·divergence / d student's raw projection."""
    options = problem.row_options
    if problem.options.target is not None:  # from here on it is a distribution of its own, tempered already
        chunk = registered_target(problem, chunk)
        options = replace(options, target=LogitTransform(scale=problem.options.temperature))
    frozen = chunk.target if chunk.base is None else chunk.base
    offset = form_difference(problem, backend, chunk)
    if problem.options.strategy == Strategy.SINGLE_READ and gradient is not None:
        from popsd_kernels import row_single_read

        return row_single_read(
            chunk.student,
            frozen,
            chunk.difference,
            offset,
            options=options,
            token_ids=chunk.token_ids,
            row_scale=chunk.row_scale,
            gradient=gradient,
        )[1]
    return backend.row_sweeps(
        chunk.student,
        frozen,
        chunk.difference,
        offset,
        student_bias=chunk.student_bias,
        target_bias=chunk.frozen_bias,
        options=options,
        token_ids=chunk.token_ids,
        row_scale=chunk.row_scale,
        gradient=gradient,
        **shared,
    )


def stream(problem: Problem, source: ProjectedStreams) -> RowLoss:
    """All tokens without chunks and without logits in memory: kernels that project and reduce in one, and accumulate."""
    from popsd_kernels import stream_divergence

    student, frozen, _, offset = source.operands(0, problem.tokens)
    vocab = problem.vocab_size
    return stream_divergence(
        student,
        frozen[0],
        frozen[1] if len(frozen) > 1 else None,
        offset,
        student_weight=source.student_weight[:vocab],
        frozen_weight=None if source.frozen_weight is source.student_weight else source.frozen_weight[:vocab],
        student_bias=source.student_bias,
        target_bias=source.frozen_bias,
        options=problem.row_options,
        token_ids=problem.tensors.token_ids,
        row_scale=problem.tensors.weights,
        dhidden=source.dhidden,
        dweight=None if source.dweight is None else source.dweight[:vocab],
        dbias=None if source.dbias is None else source.dbias[:vocab],
    )
