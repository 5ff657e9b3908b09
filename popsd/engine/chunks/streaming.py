"""A loss without chunks and without logits in memory."""

from __future__ import annotations

from popsd.engine.problem import Problem
from popsd.engine.sources import ProjectedStreams
from popsd_kernels.rows import Gradients, Heads, RowLoss, Rows


def stream(problem: Problem, source: ProjectedStreams) -> RowLoss:
    """All tokens at once by kernels that project and reduce in one; gradients end up in ``source``."""
    from popsd_kernels import stream_divergence

    student, frozen, _, offset = source.operands(0, problem.tokens)
    composed, vocab = len(frozen) > 1, problem.vocab_size
    rows = Rows(
        student,
        base=frozen[0] if composed else None,
        difference=frozen[1] if composed else None,
        offset=offset,
        target=None if composed else frozen[0],
        student_bias=source.student_bias,
        frozen_bias=source.frozen_bias,
        token_ids=problem.tensors.token_ids,
        row_scale=source.row_scale,
    )
    frozen_weight = None if source.frozen_weight is source.student_weight else source.frozen_weight[:vocab]
    gradients = Gradients(
        source.dhidden,
        None if source.dweight is None else source.dweight[:vocab],
        None if source.dbias is None else source.dbias[:vocab],
    )
    return stream_divergence(rows, Heads(source.student_weight[:vocab], frozen_weight), problem.row_options, gradients)
