"""The one loop over token chunks: load a chunk's logits, sweep, sweep, fold the gradient. It holds no formula and no plan; the
sweeps are Triton kernels or the torch bodies of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from popsd import masks, torch_tiles
from popsd.config import Impl, Method, Strategy
from popsd.decomposition import decompose_hidden, fields_of, gather, row_moments
from popsd.planning import plan_rows
from popsd.precision import exact_matmuls
from popsd.streams import Chunk, GivenLogits, Problem, ProjectedStreams
from popsd.telemetry import movement_rows, size_rows
from popsd.types import Decomposition, Purification
from popsd_kernels.options import RowLoss, RowOptions, RowStatistics

SWEEP_ELEMENTS = 2 << 17
"""Elements per stream that a torch body sees at once: 1 MiB of float32, so that its seven temporaries stay in a shared cache
and the calls from Python (some 60 per block) cost less than 5 % of the matrix products."""

DIAGNOSTIC_ELEMENTS = 1 << 24
"""Elements per stream that a diagnostic in plain torch sees at once: 64 MiB per temporary, beside the workspace."""


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


class TileResult(NamedTuple):
    """Per-token results, [N] each."""

    rows: RowLoss
    decomposition: Decomposition | None
    purification: Purification | None


def resolve_impl(impl: Impl, device: torch.device) -> Impl:
    """AUTO: Triton on NVIDIA and AMD GPUs where Triton is installed, torch elsewhere. The others are themselves."""
    if impl is not Impl.AUTO:
        return impl
    return Impl.TRITON if device.type == "cuda" and find_spec("triton") is not None else Impl.TORCH


def bodies_for(impl: Impl) -> Bodies:
    if impl is Impl.TORCH:
        return Bodies(
            torch_tiles.row_statistics,
            torch_tiles.row_sweeps,
            torch_tiles.logit_difference,
            row_moments,
            masks.entry_thresholds,
            masks.mask_entries,
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
    return {"rows": torch_tiles.student_rows(*student)}


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
        delta, offset, thresholds, base, reference, tail_reach=masks.tail_reach(config), **common
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
    base, teacher, delta, *free = torch_tiles.scratch(chunk.target, 5, held=_BESIDE)
    for raw, out in ((chunk.target, base), (chunk.teacher, teacher)):
        torch_tiles.tempered_logits(raw, source.target_bias, options.target, options, out=out)
    mask = _entry_mask(problem, source, bodies_for(Impl.TORCH), chunk)
    offset = torch_tiles.logit_difference(
        chunk.teacher, chunk.reference, out=delta, bias=source.target_bias, options=options, center=config.center
    )
    size = size_rows(torch.mul(delta, scale, out=free[0]).sub_(offset[:, None]).abs_(), config.pmi_clip)
    mask(delta, offset)
    target = torch_tiles.purified_shift(delta, offset, options, out=delta).add_(base)
    return Purification(*size, *movement_rows(base, teacher, target, *free))


_BESIDE = torch_tiles.HELD + torch_tiles.DIFFERENCE
"""Scratch buffers that are taken while `logit_difference` runs."""
