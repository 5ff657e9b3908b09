"""The one loop over token chunks: load a chunk's logits, sweep, sweep, fold the gradient. It holds no formula and no plan; the
sweeps are Triton kernels or the torch bodies of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from popsd.config import Method, PurifiedConfig, Strategy
from popsd.engine.backends import Backend, TorchBackend, backend_for
from popsd.engine.decomposition import decompose_hidden, fields_of, gather
from popsd.engine.precision import exact_matmuls
from popsd.engine.problem import Problem
from popsd.engine.sources import Chunk, GivenLogits, ProjectedStreams
from popsd.engine.torch_backend import entry_masks, scratch, targets
from popsd.engine.torch_backend.purification import movement_rows, size_rows
from popsd.engine.workspace import plan_rows
from popsd.outputs import Decomposition, Purification
from popsd_kernels.rows import MOMENTS, Gradients, Heads, RowLoss, RowOptions, Rows

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
    composed, vocab = len(frozen) > 1, problem.vocab_size
    rows = Rows(
        student,
        base=frozen[0] if composed else None,
        difference=frozen[1] if composed else None,
        offset=offset,
        target=None if composed else frozen[0],
        student_bias=source.student_bias,
        frozen_bias=source.target_bias,
        token_ids=problem.token_ids,
        row_scale=problem.weights,
    )
    frozen_weight = None if source.frozen_weight is source.student_weight else source.frozen_weight[:vocab]
    gradients = Gradients(
        source.dhidden,
        None if source.dweight is None else source.dweight[:vocab],
        None if source.dbias is None else source.dbias[:vocab],
    )
    return stream_divergence(rows, Heads(source.student_weight[:vocab], frozen_weight), problem.row_options, gradients)


def _run_tiles(problem: Problem, source: ProjectedStreams | GivenLogits) -> TileResult:
    backend = backend_for(problem.impl, problem.student.device, problem.strategy)
    tokens, work = problem.student.shape[0], source.work
    chunk_rows, gradient_rows = plan_rows(
        tokens, work, problem.student.device, problem.workspace_mib, decompose=problem.decompose is Method.LOGITS
    )
    source.allocate(min(chunk_rows, tokens), min(gradient_rows, tokens) if work.gradient_bytes else 0)
    empty = problem.student.new_empty(0, dtype=torch.float32)
    losses = [RowLoss(*[empty] * len(RowLoss._fields))]
    moments = [empty.expand(MOMENTS, 0)]
    purifications = [Purification(*[empty] * len(Purification._fields))]
    for first in range(0, tokens, gradient_rows):
        last = min(first + gradient_rows, tokens)
        for start in range(first, last, chunk_rows):
            stop = min(start + chunk_rows, last)
            chunk, gradient = source.load(start, stop), source.gradient(first, start, stop)
            step = backend.block_rows(stop - start, problem.vocab_size)
            for i in range(0, stop - start, step):
                j = min(i + step, stop - start)
                rows = slice(start + i, start + j)
                part = chunk.rows(i, j)
                if problem.decompose is Method.LOGITS:
                    moments.append(_moments(problem, source, backend, part))
                if problem.telemetry:
                    purifications += [_purification(problem, source, piece) for piece in _pieces(problem, part)]
                into = None if gradient is None else gradient[i:j]
                losses.append(_sweep(problem, source, backend, part, rows, into))
        source.fold(first, last)
    return TileResult(
        RowLoss(*map(torch.cat, zip(*losses, strict=True))),
        fields_of(torch.cat(moments, dim=1)) if problem.decompose is Method.LOGITS else None,
        Purification(*map(torch.cat, zip(*purifications, strict=True))) if problem.telemetry else None,
    )


def target_logits(problem: Problem) -> torch.Tensor:
    """Finished logits of the purified target over all tokens at once, [N, V] float32, from given logits."""
    backend = backend_for(problem.impl, problem.student.device)
    source = GivenLogits(problem, with_gradient=False)
    source.allocate(problem.student.shape[0], 0)
    chunk = source.load(0, problem.student.shape[0])
    assert chunk.delta is not None
    rows = _difference(problem, backend, _rows(problem, source, chunk), chunk.delta)
    backend.statistics(rows, problem.row_options, target_out=chunk.delta)
    return chunk.delta


def _rows(problem: Problem, source: ProjectedStreams | GivenLogits, chunk: Chunk, tokens: slice | None = None) -> Rows:
    """A chunk as the sweeps take it. Given teacher and reference on their own, the difference is yet to be formed."""
    composed = chunk.delta is not None
    rows = Rows(
        chunk.student,
        base=chunk.target if composed else None,
        difference=None if problem.apart else chunk.delta,
        offset=chunk.offset,
        target=None if composed else chunk.target,
        teacher=chunk.teacher,
        reference=chunk.reference,
        student_bias=source.student_bias,
        frozen_bias=source.target_bias,
    )
    if tokens is None:
        return rows
    return rows._replace(
        token_ids=None if problem.token_ids is None else problem.token_ids[tokens],
        row_scale=None if problem.weights is None else problem.weights[tokens],
    )


def _sweep(
    problem: Problem,
    source: ProjectedStreams | GivenLogits,
    backend: Backend,
    chunk: Chunk,
    tokens: slice,
    gradient: torch.Tensor | None,
) -> RowLoss:
    rows = _difference(problem, backend, _rows(problem, source, chunk, tokens), chunk.delta)
    return backend.sweeps(rows, problem.row_options, gradient=gradient)


def _difference(problem: Problem, backend: Backend, rows: Rows, out: torch.Tensor | None) -> Rows:
    """With the finished difference in ``out``, masks on its entries applied; with two distributions nothing is done."""
    config, options = problem.purified, problem.row_options
    if config is None or out is None:
        return rows
    mask = _entry_mask(backend, rows, config, options)  # before the difference takes the place of a stream
    if problem.apart:
        offset = backend.logit_difference(rows, options, center=config.center, out=out)
        rows = rows._replace(difference=out, offset=offset)
    mask(rows)
    return rows


def _entry_mask(backend: Backend, rows: Rows, config: PurifiedConfig, options: RowOptions) -> Callable[[Rows], None]:
    """Applies plausibility and the tail cap, as far as there are any, to the difference of the same rows."""
    masks = entry_masks.masks_of(config)
    if masks is None:
        return lambda rows: None
    thresholds = backend.entry_thresholds(rows, masks, options)
    return lambda rows: backend.mask_entries(rows, thresholds, masks, options)


def _pieces(problem: Problem, chunk: Chunk) -> Iterator[Chunk]:
    """Few enough rows for a diagnostic in plain torch."""
    step = max(1, DIAGNOSTIC_ELEMENTS // problem.vocab_size)
    for start in range(0, chunk.student.shape[0], step):
        yield chunk.rows(start, start + step)


def _moments(problem: Problem, source: ProjectedStreams | GivenLogits, backend: Backend, chunk: Chunk) -> torch.Tensor:
    rows = _rows(problem, source, chunk)
    biased = rows.student_bias is not None or rows.frozen_bias is not None
    return backend.moments(rows, problem.row_options, masked=problem.heads is None or biased)


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
    backend, rows = TorchBackend(), _rows(problem, source, chunk)
    mask = _entry_mask(backend, rows, config, options)
    offset = backend.logit_difference(rows, options, center=config.center, out=delta)
    size = size_rows(torch.mul(delta, scale, out=free[0]).sub_(offset[:, None]).abs_(), config.pmi_clip)
    mask(rows._replace(difference=delta, offset=offset))
    target = targets.purified_shift(delta, offset, options, out=delta).add_(base)
    return Purification(*size, *movement_rows(base, teacher, target, *free))


_BESIDE = scratch.HELD + scratch.DIFFERENCE
"""Scratch buffers that are taken while `logit_difference` runs."""
