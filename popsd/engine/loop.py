"""The one loop over token chunks: load a chunk's logits, sweep, sweep, fold the gradient. It holds no formula and no plan; the
sweeps are Triton kernels or the torch bodies of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from popsd.config import Impl, Method, Strategy
from popsd.engine.backends import Bodies, bodies_for, resolve_impl
from popsd.engine.decomposition import decompose_hidden, fields_of, gather
from popsd.engine.precision import exact_matmuls
from popsd.engine.problem import Problem
from popsd.engine.sources import Chunk, GivenLogits, ProjectedStreams
from popsd.engine.torch_backend import entry_masks, scratch, targets
from popsd.engine.torch_backend.purification import movement_rows, size_rows
from popsd.engine.workspace import plan_rows
from popsd.outputs import Decomposition, Purification
from popsd_kernels.rows import RowLoss

DIAGNOSTIC_ELEMENTS = 1 << 24
"""Elements per stream that a diagnostic in plain torch sees at once: 64 MiB per temporary, beside the workspace."""


class TileResult(NamedTuple):
    """Per-token results, [N] each."""

    rows: RowLoss
    decomposition: Decomposition | None
    purification: Purification | None


def run_tiles(problem: Problem, source: ProjectedStreams | GivenLogits) -> TileResult:
    """Per-token results; gradients of Σ weights·divergence, where ``source`` wants them, end up in it."""
    with exact_matmuls(problem.student.device):
        if problem.strategy is Strategy.STREAMING:
            assert isinstance(source, ProjectedStreams)
            result = TileResult(_stream(problem, source), None, None)
        else:
            result = _run_tiles(problem, source)
        return result._replace(decomposition=_gram(problem)) if problem.decompose is Method.GRAM else result


def _stream(problem: Problem, source: ProjectedStreams) -> RowLoss:
    """No chunks and no logits: tile kernels project and fold in one."""
    from popsd_kernels import stream_divergence

    student, frozen, _, offset = source.hidden_rows(0, problem.student.shape[0])
    vocab = problem.vocab_size
    return stream_divergence(
        student,
        frozen[0],
        frozen[1] if len(frozen) > 1 else None,
        offset,
        student_weight=source.student_weight[:vocab],
        frozen_weight=None if source.frozen_weight is source.student_weight else source.frozen_weight[:vocab],
        student_bias=source.student_bias,
        target_bias=source.target_bias,
        options=problem.row_options,
        token_ids=problem.token_ids,
        row_scale=problem.weights,
        dhidden=source.dhidden,
        dweight=None if source.dweight is None else source.dweight[:vocab],
        dbias=None if source.dbias is None else source.dbias[:vocab],
    )


def _run_tiles(problem: Problem, source: ProjectedStreams | GivenLogits) -> TileResult:
    bodies = bodies_for(resolve_impl(problem.impl, problem.student.device))
    tokens, work = problem.student.shape[0], source.work
    chunk_rows, gradient_rows = plan_rows(
        tokens, work, problem.student.device, problem.workspace_mib, decompose=problem.decompose is Method.LOGITS
    )
    source.allocate(min(chunk_rows, tokens), min(gradient_rows, tokens) if work.gradient_bytes else 0)
    empty = problem.student.new_empty(0, dtype=torch.float32)
    losses = [RowLoss(*[empty] * len(RowLoss._fields))]
    moments = [empty.expand(13, 0)]
    purifications = [Purification(*[empty] * len(Purification._fields))]
    for first in range(0, tokens, gradient_rows):
        last = min(first + gradient_rows, tokens)
        for start in range(first, last, chunk_rows):
            stop = min(start + chunk_rows, last)
            chunk, gradient = source.load(start, stop), source.gradient(first, start, stop)
            step = stop - start
            if bodies.sweep_elements is not None:
                step = max(1, min(step, bodies.sweep_elements // problem.vocab_size))
            for i in range(0, stop - start, step):
                j = min(i + step, stop - start)
                rows = slice(start + i, start + j)
                part = chunk.rows(i, j)
                shared = bodies.shared(part.student, source.student_bias, problem.row_options)
                if problem.decompose is Method.LOGITS:
                    moments.append(_moments(problem, source, bodies, part, shared))
                if problem.telemetry:
                    purifications += [_purification(problem, source, piece) for piece in _pieces(problem, part)]
                losses.append(_sweep(problem, source, bodies, part, rows, gradient, slice(i, j), shared))
        source.fold(first, last)
    return TileResult(
        RowLoss(*map(torch.cat, zip(*losses, strict=True))),
        fields_of(torch.cat(moments, dim=1)) if problem.decompose is Method.LOGITS else None,
        Purification(*map(torch.cat, zip(*purifications, strict=True))) if problem.telemetry else None,
    )


def target_logits(problem: Problem) -> torch.Tensor:
    """Finished logits of the purified target over all tokens at once, [N, V] float32, from given logits."""
    bodies = bodies_for(resolve_impl(problem.impl, problem.student.device))
    source, options = GivenLogits(problem, with_gradient=False), problem.row_options
    source.allocate(problem.student.shape[0], 0)
    chunk = source.load(0, problem.student.shape[0])
    assert chunk.delta is not None
    offset = _difference(problem, source, bodies, chunk)
    bodies.row_statistics(chunk.student, chunk.target, chunk.delta, offset, options=options, target_out=chunk.delta)
    return chunk.delta


def _sweep(
    problem: Problem,
    source: ProjectedStreams | GivenLogits,
    bodies: Bodies,
    chunk: Chunk,
    rows: slice,
    gradient: torch.Tensor | None,
    local: slice,
    shared: dict[str, Any],
) -> RowLoss:
    options, target = problem.row_options, chunk.target
    offset = _difference(problem, source, bodies, chunk)
    token_ids = None if problem.token_ids is None else problem.token_ids[rows]
    row_scale = None if problem.weights is None else problem.weights[rows]
    if problem.strategy is Strategy.SINGLE_READ and gradient is not None:
        from popsd_kernels import row_single_read

        return row_single_read(
            chunk.student,
            target,
            chunk.delta,
            offset,
            options=options,
            token_ids=token_ids,
            row_scale=row_scale,
            gradient=gradient[local],
        )[1]
    return bodies.row_sweeps(
        chunk.student,
        target,
        chunk.delta,
        offset,
        student_bias=source.student_bias,
        target_bias=source.target_bias,
        options=options,
        token_ids=token_ids,
        row_scale=row_scale,
        gradient=None if gradient is None else gradient[local],
        **shared,
    )


def _difference(
    problem: Problem, source: ProjectedStreams | GivenLogits, bodies: Bodies, chunk: Chunk
) -> torch.Tensor | None:
    """The finished difference in ``chunk.delta``, masks on its entries applied; returns its offset [n]."""
    config, options, offset = problem.purified, problem.row_options, chunk.offset
    if config is None or chunk.delta is None:
        return offset
    mask = _entry_mask(problem, source, bodies, chunk)  # before delta takes the place of a stream
    if problem.apart:
        offset = bodies.logit_difference(
            chunk.teacher,
            chunk.reference,
            out=chunk.delta,
            bias=source.target_bias,
            options=options,
            center=config.center,
        )
    mask(chunk.delta, offset)
    return offset


def _entry_mask(
    problem: Problem, source: ProjectedStreams | GivenLogits, bodies: Bodies, chunk: Chunk
) -> Callable[[torch.Tensor, torch.Tensor | None], None]:
    """Applies plausibility and the tail cap, as far as there are any, to a difference [n, V] with its offset [n]."""
    config, common = problem.purified, {"bias": source.target_bias, "options": problem.row_options}
    if config is None or not config.masks_entries:
        return lambda delta, offset: None
    base = None if config.plausibility is None else chunk.target
    teacher, reference = (None, None) if config.tail_floor is None else (chunk.teacher, chunk.reference)
    thresholds = bodies.entry_thresholds(
        base, teacher, reference, plausibility=config.plausibility, tail_floor=config.tail_floor, **common
    )
    return lambda delta, offset: bodies.mask_entries(
        delta, offset, thresholds, base, reference, tail_reach=entry_masks.tail_reach(config), **common
    )


def _pieces(problem: Problem, chunk: Chunk) -> Iterator[Chunk]:
    """Few enough rows for a diagnostic in plain torch."""
    step = max(1, DIAGNOSTIC_ELEMENTS // problem.vocab_size)
    for start in range(0, chunk.student.shape[0], step):
        yield chunk.rows(start, start + step)


def _moments(
    problem: Problem, source: ProjectedStreams | GivenLogits, bodies: Bodies, chunk: Chunk, shared: dict[str, Any]
) -> torch.Tensor:
    own, frozen = source.student_bias, source.target_bias
    return bodies.row_moments(
        chunk.student,
        chunk.reference,
        teacher=chunk.teacher,
        delta=chunk.delta if chunk.teacher is None else None,
        student_bias=own,
        target_bias=frozen,
        options=problem.row_options,
        masked=problem.heads is None or own is not None or frozen is not None,
        **shared,
    )


def _gram(problem: Problem) -> Decomposition:
    """From hidden states, a few rows at a time, beside whatever the sweeps do."""
    assert problem.heads is not None and problem.teacher is not None and problem.reference is not None
    head, tokens = problem.heads[0], problem.student.shape[0]
    step = max(1, DIAGNOSTIC_ELEMENTS // head.weight.shape[1])
    parts = [
        decompose_hidden(
            problem.student[start : start + step],
            problem.teacher[start : start + step],
            problem.reference[start : start + step],
            head,
            vocab_size=problem.vocab_size,
            temperature=problem.config.temperature,
        )
        for start in range(0, max(tokens, 1), step)
    ]
    return gather(parts)


def _purification(problem: Problem, source: ProjectedStreams | GivenLogits, chunk: Chunk) -> Purification:
    """In plain torch, whatever computes the loss."""
    options, config, scale = problem.row_options, problem.purified, problem.row_options.inv_temperature
    assert config is not None and chunk.teacher is not None and chunk.reference is not None
    base, teacher, delta, *free = scratch.scratch(chunk.target, 5, held=_BESIDE)
    for raw, out in ((chunk.target, base), (chunk.teacher, teacher)):
        targets.tempered_logits(raw, source.target_bias, options.target, options, out=out)
    mask = _entry_mask(problem, source, bodies_for(Impl.TORCH), chunk)
    offset = targets.logit_difference(
        chunk.teacher, chunk.reference, out=delta, bias=source.target_bias, options=options, center=config.center
    )
    size = size_rows(torch.mul(delta, scale, out=free[0]).sub_(offset[:, None]).abs_(), config.pmi_clip)
    mask(delta, offset)
    target = targets.purified_shift(delta, offset, options, out=delta).add_(base)
    return Purification(*size, *movement_rows(base, teacher, target, *free))


_BESIDE = scratch.HELD + scratch.DIFFERENCE
"""Scratch buffers that are taken while `logit_difference` runs."""
