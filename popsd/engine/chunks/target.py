"""The purified target of a block of tokens: its difference, the masks on its entries, its finished logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from popsd.config import Impl
from popsd.engine.backends import Bodies, bodies_for, resolve_impl
from popsd.engine.chunks.registry import registered_logits
from popsd.engine.problem import Problem
from popsd.engine.sources import Chunk, GivenLogits
from popsd.engine.torch_backend import entry_masks


def form_difference(problem: Problem, backend: Bodies, chunk: Chunk) -> torch.Tensor | None:
    """Finishes ``chunk.difference``, masks on its entries applied; returns its offset [n]. Nothing with two distributions."""
    offset = chunk.offset
    if chunk.difference is None:
        return offset
    mask = entry_mask(problem, backend, chunk)  # before the difference takes the place of a stream
    if problem.needs_separate_logits:
        offset = backend.logit_difference(
            chunk.teacher,
            chunk.reference,
            out=chunk.difference,
            bias=chunk.frozen_bias,
            options=problem.row_options,
            center=problem.options.center,
        )
    mask(chunk.difference, offset)
    return offset


def entry_mask(problem: Problem, backend: Bodies, chunk: Chunk) -> Callable[[torch.Tensor, torch.Tensor | None], None]:
    """Applies plausibility and the tail cap, as far as there are any, to a difference [n, V] with its offset [n]."""
    options, common = problem.options, {"bias": chunk.frozen_bias, "options": problem.row_options}
    if not problem.masks_entries:
        return lambda difference, offset: None
    base = None if options.plausibility is None else chunk.base
    teacher, reference = (None, None) if options.tail_floor is None else (chunk.teacher, chunk.reference)
    thresholds = backend.entry_thresholds(
        base, teacher, reference, plausibility=options.plausibility, tail_floor=options.tail_floor, **common
    )
    reach = entry_masks.tail_reach(options.tail_cap, options.pmi_clip)
    return lambda difference, offset: backend.mask_entries(
        difference, offset, thresholds, base, reference, tail_reach=reach, **common
    )


def target_logits(problem: Problem) -> torch.Tensor:
    """Finished logits of the purified or registered target over all tokens at once, [N, V] float32, from given logits."""
    backend = bodies_for(resolve_impl(Impl(problem.options.impl), problem.tensors.student.device))
    source = GivenLogits(problem)
    source.allocate(problem.tokens, 0)
    chunk = source.load(slice(0, problem.tokens))
    if problem.options.target is not None:
        return registered_logits(problem, chunk)
    assert chunk.base is not None and chunk.difference is not None
    offset, difference = form_difference(problem, backend, chunk), chunk.difference
    backend.row_statistics(
        chunk.student, chunk.base, difference, offset, options=problem.row_options, target_out=difference
    )
    return difference
