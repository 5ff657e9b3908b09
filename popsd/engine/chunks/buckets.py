"""A target known at k entries of the vocabulary: the distributions that the sweeps see, and the gradient's way back.

The k entries keep their logits and all others become one, the tail. A distribution over these k + 1 buckets is that of the
vocabulary coarsened, so the sweeps of two distributions compute every divergence of it. With the student's logits z and
z_tail = log Σ_{v outside} exp(z_v) their gradient G over the buckets is

    d loss / d z_v = G_v for an entry of the target,    G_tail · exp(z_v − z_tail) for the others,

which is one more pass over the chunk's logits. Without a tail nothing reaches the others.
"""

from __future__ import annotations

import torch

from popsd.engine.problem import Problem
from popsd.engine.torch_backend.sweeps import normaliser
from popsd.engine.torch_backend.targets import tempered_logits
from popsd_kernels.rows import LOGIT_FLOOR, LogitTransform, RowLoss, RowOptions, Rows

LEAST_TAIL = 1e-7
"""Probability of a target's tail at least. 1 − Σ exp(log-prob) of float32 log-probs is no better known than that, and a tail
of 0 would make every reverse KL infinite. TRL's server distillation has the same bound."""


def target_buckets(
    ids: torch.Tensor, log_probs: torch.Tensor, vocab_size: int, *, add_tail: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sweeps take of a target's ids and log-probabilities [..., k]: ids [..., k] int64, -1 where a place holds
    nothing, and the log-probabilities of the buckets, [..., k] or with a tail [..., k + 1] float32.

    An id of -1, a log-probability of -inf and an id's second place in its row hold nothing.
    """
    ids = ids.masked_fill(is_empty(ids, log_probs), -1)
    # 1 − Σ would lose the tail's digits in float32; MPS has no float64
    wide = log_probs.detach().to(torch.float32 if log_probs.device.type == "mps" else torch.float64)
    wide = wide.masked_fill(ids < 0, -torch.inf)
    if add_tail:
        mass = wide.logsumexp(-1, keepdim=True).clamp(max=-LEAST_TAIL)
        is_everything = (ids >= 0).sum(-1, keepdim=True) == vocab_size
        wide = torch.cat([wide, (-torch.expm1(mass)).log().masked_fill(is_everything, -torch.inf)], dim=-1)
    return ids, wide.float().clamp_min(LOGIT_FLOOR)


def is_empty(ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Which places of [..., k] hold nothing."""
    nothing = (ids < 0) | torch.isneginf(log_probs)
    ordered, order = ids.masked_fill(nothing, -1).sort(dim=-1, stable=True)
    again = torch.zeros_like(nothing)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return nothing | torch.empty_like(again).scatter_(-1, order, again)


class Buckets:
    """A block of n tokens with a sparse target.

    rows: their buckets, [n, k] or [n, k + 1] float32 of student and target, tempered, for the sweeps. The student's own
    logits [n, V] are overwritten. gradient: a place for the sweeps' gradient, or None where none is wanted.
    """

    def __init__(self, problem: Problem, rows: Rows, tokens: slice, *, with_gradient: bool) -> None:
        options, target, ids = problem.options, rows.target, problem.tensors.target_ids
        assert ids is not None and target is not None
        ids, self.inv_temperature = ids[tokens], 1.0 / options.temperature
        self.transform = LogitTransform(options.student_scale, options.student_softcap)
        tempering = RowOptions(inv_temperature=self.inv_temperature)
        z = tempered_logits(rows.student, rows.student_bias, self.transform, tempering, out=rows.student)
        self.is_listed, self.places, self.has_tail = ids >= 0, ids.clamp_min(0), target.shape[1] > ids.shape[1]
        self.slope = self._slope(z) if with_gradient else None
        listed = _floored(z.gather(1, self.places)).masked_fill(~self.is_listed, LOGIT_FLOOR)
        sampled = None if rows.token_ids is None else z.gather(1, rows.token_ids.clamp(0, z.shape[1] - 1)[:, None])
        # several places may name entry 0, of which the empty ones must leave it alone
        removed = torch.full_like(listed, torch.inf).masked_fill_(self.is_listed, LOGIT_FLOOR)
        z.scatter_reduce_(1, self.places, removed, "amin")
        top, self.logsum = normaliser(z, out=z)
        self.shares = z  # of the tail, times exp(logsum)
        tail = _floored(top + self.logsum)[:, None]
        student = torch.cat([listed, tail], dim=1) if self.has_tail else listed
        bucket, self.token_logprob = None, None
        if rows.token_ids is not None and sampled is not None:
            found = (ids == rows.token_ids[:, None]) & self.is_listed
            bucket = torch.where(found.any(dim=1), found.int().argmax(dim=1), -1)
            logprob = sampled[:, 0] - torch.cat([listed, tail], dim=1).logsumexp(dim=1)
            inside = (rows.token_ids >= 0) & (rows.token_ids < z.shape[1])
            self.token_logprob = logprob.where(inside, torch.nan)
        self.rows = Rows(student, target=target, token_ids=bucket, row_scale=rows.row_scale)
        self.gradient = torch.empty_like(student) if with_gradient else None

    def finish(self, losses: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """After the sweeps: the token's own log-probability into results [9, n], for it may be in the tail; and the gradient of
        the raw projections into ``gradient`` [n, V], which may share their memory."""
        if self.token_logprob is not None:
            losses[RowLoss._fields.index("token_logprob")] = self.token_logprob
        if gradient is None:
            return
        assert self.gradient is not None
        chain = self.transform.scale * self.inv_temperature
        listed = self.gradient[:, : self.places.shape[1]] * chain
        if self.slope is not None:
            listed *= self.slope.gather(1, self.places)
            self.shares.mul_(self.slope)
        if self.has_tail:
            torch.mul(self.shares, self.gradient[:, -1:] * (chain * torch.exp(-self.logsum))[:, None], out=gradient)
        else:
            gradient.zero_()
        # what they add to is 0: an entry of the target has no share of the tail
        gradient.scatter_add_(1, self.places, listed.masked_fill(~self.is_listed, 0.0).to(gradient.dtype))

    def _slope(self, z: torch.Tensor) -> torch.Tensor | None:
        """Of the soft cap, [n, V]."""
        if self.transform.softcap is None:
            return None
        return torch.div(z, self.transform.softcap * self.inv_temperature).square_().neg_().add_(1.0).clamp_min_(0.0)


def _floored(logits: torch.Tensor) -> torch.Tensor:
    """Those of impossible entries at the floor again, whatever scale or temperature it went through."""
    return logits.masked_fill(logits < 1e-6 * LOGIT_FLOOR, LOGIT_FLOOR)
