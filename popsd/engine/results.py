"""The per-token results of one loss as the rows of one tensor: which there are, where they are written, how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from popsd.config import Method
from popsd.engine.problem import Options, Problem
from popsd.outputs import GRAM_FIELDS, Decomposition, LossOutput, Purification
from popsd_kernels.rows import RowLoss

MOMENTS = 13
"""Rows of `row_moments`."""
OF_SAMPLED = ("token_logprob", "target_logprob")
"""Results that need the sampled tokens."""


def result_names(options: Options) -> list[str]:
    """Of the rows: the fields of `RowLoss` and the target's log-probability, then the known fields of `Decomposition` and those
    of `Purification`, if wanted."""
    decomposition = {None: (), Method.LOGITS.value: Decomposition._fields, Method.GRAM.value: GRAM_FIELDS}
    names = [*RowLoss._fields, "target_logprob", *decomposition[options.decompose]]
    return names + list(Purification._fields if options.purification else ())


class Results:
    """Buffers for the results of N tokens, float32, to be filled by slices of tokens."""

    def __init__(self, problem: Problem) -> None:
        tokens, student = problem.tokens, problem.tensors.student
        names = result_names(problem.options)
        self.rows = student.new_empty((len(names), tokens), dtype=torch.float32)
        first, last = len(RowLoss._fields), len(names) - len(Purification._fields) * problem.options.purification
        self.losses, sampled, self.decomposition, self.purification = self.rows.tensor_split((first, first + 1, last))
        self.target_logprob = sampled[0]
        wanted = problem.options.decompose == Method.LOGITS.value
        self.moments = student.new_empty((MOMENTS, tokens), dtype=torch.float32) if wanted else None

    def write_decomposition(self, parts: Decomposition) -> None:
        self.decomposition[:] = torch.stack([x for x in parts if x is not None])


def columns_of(rows: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """Rows [R, ...] by the names of their fields, those that hold something."""
    columns = dict(zip(result_names(problem.options), rows.unbind(0), strict=True))
    if problem.tensors.token_ids is None:
        for name in OF_SAMPLED:
            del columns[name]
    return columns


def decomposition_of(columns: dict[str, torch.Tensor], problem: Problem) -> Decomposition | None:
    if problem.options.decompose is None:
        return None
    return Decomposition(*(columns.get(name) for name in Decomposition._fields))


def loss_output(
    loss: torch.Tensor, rows: torch.Tensor, problem: Problem, shape: Sequence[int], weights: torch.Tensor
) -> LossOutput:
    """What every loss returns, in the shape of its tokens. loss: [N] or scalar. rows: [R, N]. weights: [N], those used."""
    columns = columns_of(rows.unflatten(1, shape), problem)
    fields: dict[str, Any] = {name: columns.get(name) for name in RowLoss._fields}
    if problem.options.purification:
        fields["purification"] = Purification(*(columns[name] for name in Purification._fields))
    return LossOutput(
        loss=loss if loss.ndim == 0 else loss.unflatten(0, shape),
        decomposition=decomposition_of(columns, problem),
        weights=weights.unflatten(0, shape),
        target_logprob=columns.get("target_logprob"),
        **fields,
    )
