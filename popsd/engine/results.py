"""The per-token results of one loss as the rows of one tensor: which there are, where they are written, how they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from popsd.config import Method
from popsd.engine.problem import Options, Problem
from popsd.outputs import GRAM_FIELDS, Decomposition, LossOutput, Purification
from popsd_kernels.rows import RowLoss

MOMENTS = 13
"""Rows of `row_moments`."""


def result_names(options: Options) -> list[str]:
    """Of the rows: the fields of `RowLoss`, then the known ones of `Decomposition` and those of `Purification`, if wanted."""
    decomposition = {None: (), Method.LOGITS.value: Decomposition._fields, Method.GRAM.value: GRAM_FIELDS}
    names = [*RowLoss._fields, *decomposition[options.decompose]]
    return names + list(Purification._fields if options.purification else ())


class Results:
    """Room for the results of N tokens, float32, to be filled by slices of tokens."""

    def __init__(self, problem: Problem) -> None:
        tokens, student = problem.tokens, problem.tensors.student
        names = result_names(problem.options)
        self.rows = student.new_empty((len(names), tokens), dtype=torch.float32)
        first, last = len(RowLoss._fields), len(names) - len(Purification._fields) * problem.options.purification
        self.losses, self.decomposition, self.purification = self.rows.tensor_split((first, last))
        wanted = problem.options.decompose == Method.LOGITS.value
        self.moments = student.new_empty((MOMENTS, tokens), dtype=torch.float32) if wanted else None

    def write_decomposition(self, parts: Decomposition) -> None:
        self.decomposition[:] = torch.stack([x for x in parts if x is not None])


def loss_output(
    loss: torch.Tensor, rows: torch.Tensor, problem: Problem, shape: Sequence[int], weights: torch.Tensor | None
) -> LossOutput:
    """What every loss returns, in the shape of its tokens. loss: [N] or scalar. rows: [R, N]. weights: [N] or None."""
    options = problem.options
    columns = dict(zip(result_names(options), rows.unflatten(1, shape).unbind(0), strict=True))
    used = torch.ones_like(rows[0]) if weights is None else weights
    decomposition = Decomposition(*(columns.get(name) for name in Decomposition._fields))
    output = LossOutput(
        loss if loss.ndim == 0 else loss.unflatten(0, shape),
        *(columns[name] for name in RowLoss._fields),
        decomposition=None if options.decompose is None else decomposition,
        weights=used.unflatten(0, shape),
        purification=Purification(*(columns[name] for name in Purification._fields)) if options.purification else None,
    )  # type: ignore[misc]
    return output if problem.tensors.token_ids is not None else output._replace(token_logprob=None)
