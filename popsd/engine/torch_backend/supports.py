"""Where a Kullback-Leibler divergence is infinite: one policy can sample a token that the other cannot.

The sweeps floor an impossible token's logit at -1e30, so that -inf never meets -inf, and would make 1e29 of an infinite loss;
less where the other's probability is small. So it is found from the logits themselves, in plain torch for every backend.
"""

from __future__ import annotations

import math

import torch

from popsd_kernels.rows import LOGIT_FLOOR, LogitTransform, RowLoss, RowOptions, Rows

NEGLIGIBLE = 700.0
"""Nats below a row's largest logit beyond which a probability is 0 in float64 too, and 0 · log 0 is 0."""


def disjoint_rows(rows: Rows, options: RowOptions) -> torch.Tensor:
    """[C] bool, for rows with their target: forward KL of a token that the target can sample and the student cannot, reverse KL
    the other way round. A purified target can sample what the base can.
    """
    target = LogitTransform() if rows.target_is_finished else options.target
    bias = None if rows.target_is_finished else rows.frozen_bias
    sides = (rows.student, rows.student_bias, options.student), (rows.frozen, bias, target)
    of, against = sides if options.beta == 1.0 else sides[::-1]
    return (_possible(*of, options.inv_temperature) & _impossible(*against)).any(dim=1)


def disjoint_heads(student_bias: torch.Tensor | None, frozen_bias: torch.Tensor | None, beta: float) -> torch.Tensor:
    """The same of two heads without soft cap, whose projections are finite: 0-dim bool, for all tokens."""
    biases = (student_bias, frozen_bias) if beta == 1.0 else (frozen_bias, student_bias)
    shape = next(x for x in biases if x is not None)
    of, against = (torch.zeros_like(shape) if x is None else x for x in biases)
    return ((of > 0.5 * LOGIT_FLOOR) & (against <= 0.5 * LOGIT_FLOOR)).any()


def mark_disjoint(
    losses: torch.Tensor,
    disjoint: torch.Tensor,
    options: RowOptions,
    gradients: tuple[torch.Tensor | None, ...] = (),
) -> None:
    """Into results [9, n] and gradients [n, ...]: the loss is inf, or ``token_clip`` where there is one, and its gradient 0.

    Without a clip the gradient of forward KL stays p − q. That of reverse KL does not exist, and is NaN.
    """
    own = "student_kl" if options.beta == 1.0 else "target_kl"
    values = {own: math.inf, "divergence": math.inf}
    if options.token_clip is not None:
        values |= {"divergence": options.token_clip, "token_clipped": 1.0}
    for name, value in values.items():
        losses[RowLoss._fields.index(name)].masked_fill_(disjoint, value)
    if options.token_clip is None and options.beta == 0.0:
        return
    for gradient in gradients:
        if gradient is not None:
            of_rows = disjoint if disjoint.ndim == 0 else disjoint[:, None]
            gradient.masked_fill_(of_rows, math.nan if options.token_clip is None else 0.0)


def _possible(
    raw: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform, inv_temperature: float
) -> torch.Tensor:
    if transform.softcap is not None:  # which no logit falls below
        return torch.ones_like(raw, dtype=torch.bool)
    z = raw if bias is None else raw + bias
    return z > z.amax(dim=1, keepdim=True) - NEGLIGIBLE / (transform.scale * inv_temperature)


def _impossible(raw: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform) -> torch.Tensor:
    if transform.softcap is not None:
        return torch.zeros_like(raw, dtype=torch.bool)
    return (raw if bias is None else raw + bias) <= 0.5 * LOGIT_FLOOR
