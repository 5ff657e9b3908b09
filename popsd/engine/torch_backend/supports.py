"""Where a Kullback-Leibler divergence is infinite: one policy can sample a token that the other cannot.

The sweeps floor an impossible token's logit at -1e30, so that -inf never meets -inf, and would make 1e29 of an infinite loss;
less where the other's probability is small. So it is found from the logits themselves, in plain torch for every backend.
"""

from __future__ import annotations

import math

import torch

from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd_kernels.rows import LOGIT_FLOOR, LogitTransform, RowLoss, RowOptions, Rows

FLOORED = 0.5 * LOGIT_FLOOR
"""A logit up to here is that of an impossible token."""
NEGLIGIBLE = 700.0
"""Nats below a row's largest logit beyond which a probability is 0 in float64 too, and 0 · log 0 is 0."""


def disjoint_rows(rows: Rows, options: RowOptions, over: Vocabulary = WHOLE) -> torch.Tensor:
    """[C] bool, for rows with their target: forward KL of a token that the target can sample and the student cannot, reverse KL
    the other way round. A purified target can sample what the base can.
    """
    target = LogitTransform() if rows.target_is_finished else options.target
    reach = NEGLIGIBLE
    if rows.difference is not None:  # how far a purified target may lift an entry over the base's likeliest
        reach += 2.0 * (math.inf if options.pmi_clip is None else options.pmi_clip) / options.pmi_beta
    bias = None if rows.target_is_finished else rows.frozen_bias
    sides = (rows.student, rows.student_bias, options.student), (rows.frozen, bias, target)
    of, against = sides if options.beta == 1.0 else sides[::-1]
    return over.any((_possible(*of, options.inv_temperature, reach, over) & _impossible(*against)).any(dim=1))


def disjoint_heads(
    student_bias: torch.Tensor | None,
    frozen_bias: torch.Tensor | None,
    options: RowOptions,
    over: Vocabulary = WHOLE,
) -> torch.Tensor:
    """The same of two heads, of which one has a bias and whose projections are finite: 0-dim bool, for all tokens."""
    sides = (student_bias, options.student), (frozen_bias, options.target)
    like = frozen_bias if student_bias is None else student_bias
    assert like is not None
    impossible = [
        torch.zeros_like(like, dtype=torch.bool) if bias is None or transform.softcap is not None else bias <= FLOORED
        for bias, transform in (sides if options.beta == 1.0 else sides[::-1])
    ]
    return over.any((~impossible[0] & impossible[1]).any())


def mark_disjoint(
    losses: torch.Tensor, disjoint: torch.Tensor, options: RowOptions, *gradients: torch.Tensor | None
) -> None:
    """Into results [9, n] and gradients [n, ...] of the ``disjoint`` [n] rows: the loss is inf, or ``token_clip``
    if there is one, with a gradient of 0.

    Without a clip the gradient of forward KL stays p − q. That of reverse KL does not exist, and is NaN. Where ``entry_clip``
    caps what an entry adds, the KL alone is inf. A row with a NaN keeps it: two heads are disjoint for every token.
    """
    disjoint = disjoint & ~losses[RowLoss._fields.index("divergence")].isnan()
    values = {"student_kl" if options.beta == 1.0 else "target_kl": math.inf}
    if options.entry_clip is None:
        values |= {"divergence": math.inf}
        if options.token_clip is not None:
            values |= {"divergence": options.token_clip, "token_clipped": 1.0}
    for name, value in values.items():
        losses[RowLoss._fields.index(name)].masked_fill_(disjoint, value)
    if options.entry_clip is not None or (options.token_clip is None and options.beta == 0.0):
        return
    for gradient in gradients:
        if gradient is not None:
            gradient.masked_fill_(disjoint[:, None], math.nan if options.token_clip is None else 0.0)


def mark_impossible(losses: torch.Tensor) -> None:
    """Into results [9, n]: the log-probability of a sampled token that is impossible is -inf, and not the floor."""
    logprob = losses[RowLoss._fields.index("token_logprob")]
    logprob.masked_fill_(
        logprob < 1e-6 * LOGIT_FLOOR, -math.inf
    )  # whatever scale or temperature the floor went through


def _possible(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    inv_temperature: float,
    reach: float,
    over: Vocabulary,
) -> torch.Tensor:
    """Whether an entry's probability is above 0: its logit is within ``reach`` of the largest, and not floored."""
    if transform.softcap is not None:  # which no logit falls below
        return torch.ones_like(raw, dtype=torch.bool)
    z = raw if bias is None else raw + bias
    least = over.max(z.amax(dim=1, keepdim=True)) - reach / (transform.scale * inv_temperature)
    return (z > least) & (z > FLOORED)


def _impossible(raw: torch.Tensor, bias: torch.Tensor | None, transform: LogitTransform) -> torch.Tensor:
    if transform.softcap is not None:
        return torch.zeros_like(raw, dtype=torch.bool)
    return (raw if bias is None else raw + bias) <= FLOORED
