"""The target of some rows: a purified one's difference and the masks on its entries, or a registered one's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from popsd.config import Impl
from popsd.engine.backends import Backend, TritonBackend, backend_for
from popsd.engine.chunks.registry import composed_rows, registered_logits
from popsd.engine.problem import Problem
from popsd.engine.sources import GivenLogits, Source
from popsd.engine.torch_backend.entry_masks import tail_reach
from popsd_kernels.rows import EntryMasks, Rows


def with_target(problem: Problem, source: Source, backend: Backend, rows: Rows) -> Rows:
    """The rows as the sweeps take them: with their finished difference, masks on its entries applied, or with a registered
    target: its device function where the sweeps can call one, else its logits.

    Where the target is one of the streams they stay as they are.
    """
    if rows.target is not None:
        return rows
    if problem.options.target is not None:
        place = source.difference_of(rows)
        composed = composed_rows(problem, rows, place) if isinstance(backend, TritonBackend) else None
        return composed or rows.with_target(registered_logits(problem, rows, place))
    mask = entry_mask(problem, backend, rows)  # before the difference takes the place of a stream
    if problem.needs_separate_logits:
        out = source.difference_of(rows)
        offset = backend.logit_difference(rows, problem.row_options, center=problem.options.center, out=out)
        rows = rows._replace(difference=out, offset=offset)
    mask(rows)
    return rows


def entry_mask(problem: Problem, backend: Backend, rows: Rows) -> Callable[[Rows], None]:
    """Applies plausibility and the tail cap, as far as there are any, to the finished difference of the same rows."""
    options, row_options = problem.options, problem.row_options
    if not problem.masks_entries:
        return lambda finished: None
    masks = EntryMasks(options.plausibility, options.tail_floor, tail_reach(options.tail_cap, options.pmi_clip))
    thresholds = backend.entry_thresholds(rows, masks, row_options)
    return lambda finished: backend.mask_entries(finished, thresholds, masks, row_options)


def target_logits(problem: Problem) -> torch.Tensor:
    """Finished logits of the purified or registered target over all tokens at once, [N, V] float32, from given logits."""
    backend = backend_for(Impl(problem.options.impl), problem.tensors.student.device)
    source = GivenLogits(problem)
    source.allocate(problem.tokens, 0)
    rows = with_target(problem, source, backend, source.load(slice(0, problem.tokens)))
    if rows.target is not None:
        return rows.target
    place = rows.target_place
    assert place is not None
    backend.statistics(rows, problem.row_options, target_out=place)
    return place
