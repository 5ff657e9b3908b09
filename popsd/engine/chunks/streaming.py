"""A loss without chunks and without logits in memory."""

from __future__ import annotations

import torch

from popsd.engine.backends import sampled_logprob
from popsd.engine.problem import Problem
from popsd.engine.sources import ProjectedStreams
from popsd_kernels.rows import Gradients, Heads, RowLoss, Rows


def stream(problem: Problem, source: ProjectedStreams) -> tuple[RowLoss, torch.Tensor]:
    """All tokens at once by kernels that project and reduce in one; gradients end up in ``source``.

    Returns the results and the target's log-probability of the sampled tokens [N], NaN where there is none.
    """
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
    heads, options, ids = Heads(source.student_weight[:vocab], frozen_weight), problem.row_options, rows.token_ids
    statistics, losses = stream_divergence(rows, heads, options, gradients)
    if ids is None:
        return losses, torch.full_like(losses.divergence, float("nan"))
    return losses, sampled_logprob(_sampled(rows, heads, ids), ids, vocab, statistics, options)


def _sampled(rows: Rows, heads: Heads, ids: torch.Tensor) -> Rows:
    """`Rows.sampled` of rows that hold hidden states: [N, 1] float32 of each."""
    picked = ids.clamp(0, heads.student.shape[0] - 1)
    frozen, empty = heads.student if heads.frozen is None else heads.frozen, torch.zeros_like(picked)
    sides = {"student": (heads.student, rows.student_bias)}
    sides |= dict.fromkeys(("base", "target"), (frozen, rows.frozen_bias)) | {"difference": (frozen, None)}
    columns = {}
    for name, (weight, bias) in sides.items():
        hidden = getattr(rows, name)
        if hidden is not None:
            column = torch.linalg.vecdot(hidden.float(), weight[picked].float())
            columns[name] = (column if bias is None else column + bias[picked])[:, None]
    return rows._replace(**columns, student_bias=None, frozen_bias=None).sampled(empty)
