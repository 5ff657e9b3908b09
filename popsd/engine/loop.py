"""The one loop over token chunks: load a chunk's logits, form the target, sweep, accumulate the gradient."""

from __future__ import annotations

import torch

from popsd.config import Impl, Method, Strategy
from popsd.engine.backends import backend_for
from popsd.engine.chunks.buckets import Buckets
from popsd.engine.chunks.decomposition import by_gram, fields_of, moment_rows
from popsd.engine.chunks.purification import purification_rows
from popsd.engine.chunks.streaming import stream
from popsd.engine.chunks.target import with_target
from popsd.engine.precision import exact_matmuls
from popsd.engine.problem import Problem
from popsd.engine.results import Results
from popsd.engine.sources import ProjectedStreams, Source
from popsd.engine.torch_backend.scratch import own_buffers
from popsd.engine.torch_backend.supports import disjoint_rows, mark_disjoint, mark_impossible
from popsd.engine.workspace import plan_rows, slices


def compute(problem: Problem, source: Source) -> torch.Tensor:
    """Results [R, N], see `result_names`; gradients of Σ weights·divergence, where ``source`` wants them, end up in it."""
    results, wanted = Results(problem), problem.options.decompose
    with exact_matmuls(problem.tensors.student.device), own_buffers():
        if problem.options.strategy == Strategy.STREAMING:
            assert isinstance(source, ProjectedStreams)
            losses, results.target_logprob[:] = stream(problem, source)
            results.losses[:] = torch.stack(losses)
        else:
            _run(problem, source, results)
        source.finish()
        mark_impossible(results.losses)
        if problem.is_disjoint_by_heads:
            assert isinstance(source, ProjectedStreams)
            source.mark_disjoint(results.losses)
        if wanted == Method.GRAM:
            results.write_decomposition(by_gram(problem))
        elif results.moments is not None:
            results.write_decomposition(fields_of(results.moments))
    return results.rows


def _run(problem: Problem, source: Source, results: Results) -> None:
    tokens, options, device = problem.tokens, problem.options, problem.tensors.student.device
    backend = backend_for(Impl(options.impl), device, Strategy(options.strategy), problem.vocabulary)
    chunk_rows, gradient_rows = plan_rows(
        tokens, source.work, device, options.workspace_mib, decompose=results.moments is not None
    )
    block_rows = backend.block_rows(chunk_rows, problem.planned_vocab_size)
    if problem.is_sparse and device.type != "cpu":  # in place: no temporaries that a cache should hold
        block_rows = chunk_rows
    source.allocate(min(chunk_rows, tokens), min(gradient_rows, tokens) if source.work.gradient_bytes else 0)
    for buffer in slices(slice(0, tokens), gradient_rows):
        for chunk in slices(buffer, chunk_rows):
            logits, gradient = source.load(chunk), source.gradient(buffer.start, chunk.start, chunk.stop)
            for block in slices(slice(0, chunk.stop - chunk.start), block_rows):
                rows, place = logits.part(block), slice(chunk.start + block.start, chunk.start + block.stop)
                if results.moments is not None:
                    results.moments[:, place] = moment_rows(problem, backend, rows)
                if options.purification:
                    results.purification[:, place] = purification_rows(problem, rows)
                rows = with_target(problem, source, backend, rows)
                wanted = dense = None if gradient is None else gradient[block]
                buckets = None
                if problem.is_sparse:
                    buckets = Buckets(problem, rows, place, with_gradient=dense is not None)
                    rows, wanted = buckets.rows, buckets.gradient
                # before a gradient takes the place of a stream
                disjoint = None
                if problem.is_disjoint_by_rows:
                    disjoint = disjoint_rows(rows, problem.row_options, problem.vocabulary)
                losses, results.target_logprob[place] = backend.sweeps(rows, problem.row_options, gradient=wanted)
                results.losses[:, place] = torch.stack(losses)
                if disjoint is not None:
                    if rows.row_scale is not None:  # whatever a masked row holds
                        disjoint &= rows.row_scale != 0
                    mark_disjoint(results.losses[:, place], disjoint, problem.row_options, wanted)
                if buckets is not None:
                    buckets.finish(results.losses[:, place], dense)
        source.accumulate(buffer.start, buffer.stop)
