"""The row sweeps in torch, with the arguments of the launchers in `popsd_kernels`: for CPU, MPS, or without Triton.

They see a few rows at a time, so that temporaries stay in cache (`TorchBackend.block_rows`), and compute in float32.
The derivation is in kernels/README.md; the mathematics they must reproduce is `oracle.py`. Whatever is reduced along a row goes
through ``over``, the ranks that share the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from popsd.engine.torch_backend.renyi import renyi
from popsd.engine.torch_backend.scratch import HELD, scratch
from popsd.engine.torch_backend.targets import target_logits, tempered_logits
from popsd.engine.vocabulary.reduce import WHOLE, Vocabulary
from popsd_kernels.rows import RowLoss, RowOptions, Rows, RowStatistics

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2


class StudentRows(NamedTuple):
    """What loss and decomposition both read of the student, in buffers that `scratch` keeps until the next block of rows."""

    logits: torch.Tensor
    """Tempered, [C, V] float32; the raw projections themselves where nothing is to be done to them."""
    maximum: torch.Tensor
    """[C, 1]."""
    bits: torch.Tensor
    """(logits − maximum) / ln 2: exp2 takes 47 µs per 2^18 entries, exp 111 (torch 2.13)."""
    probabilities: torch.Tensor
    logsum: torch.Tensor
    """log Σ exp(logits − maximum), [C, 1]."""


def student_rows(rows: Rows, options: RowOptions, over: Vocabulary = WHOLE) -> StudentRows:
    own, bits, p = scratch(rows.student, HELD, held=0)
    logits = tempered_logits(
        rows.student, rows.student_bias, options.student, options, out=own, finite=options.minus_student
    )
    maximum = over.max(logits.amax(dim=1, keepdim=True))
    torch.sub(logits, maximum, out=bits).mul_(LOG2E)
    logsum = over.sum(torch.exp2(bits, out=p).sum(dim=1, keepdim=True)).log_()
    return StudentRows(logits, maximum, bits, p.mul_(torch.exp(-logsum)), logsum)


def row_statistics(
    rows: Rows, options: RowOptions, *, target_out: torch.Tensor | None = None, over: Vocabulary = WHOLE
) -> RowStatistics:
    """As ``popsd_kernels.row_statistics``: normalisers [C], and a composed target's logits into ``target_out`` [C, V] float32.

    ``target_out`` may be ``rows.base`` or ``rows.difference`` itself, and may be left out.
    """
    s, u, free = scratch(rows.student, 3)
    own = tempered_logits(
        rows.student, rows.student_bias, options.student, options, out=s, finite=options.minus_student
    )
    target = target_logits(rows, options, u, free)
    if target_out is not None:
        target_out.copy_(target)
    if options.minus_student:
        target = torch.add(target, own, out=u)
    return RowStatistics(*normaliser(own, free, over), *normaliser(target, free, over))


def row_sweeps(
    rows: Rows,
    options: RowOptions,
    *,
    gradient: torch.Tensor | None = None,
    student: StudentRows | None = None,
    over: Vocabulary = WHOLE,
) -> tuple[RowLoss, torch.Tensor]:
    """Both sweeps: per-token results, the target's log-probability [C] of the sampled tokens (NaN: no token) and, into
    ``gradient``, d divergence / d student raw projection times ``rows.row_scale``.

    Rows that fit a cache need no second read. One exponential per entry and stream serves normaliser and probability.
    gradient: [C, V] of any floating dtype, or None for no gradient work; it may share memory with the base or the target.
    student: `student_rows` of the same arguments where they exist already; overwritten.
    """
    token_ids, row_scale = rows.token_ids, rows.row_scale
    own, student_max, s, p, student_logsum = student or student_rows(rows, options, over)
    u, t, q, free, more = scratch(rows.student, 5)
    target = target_logits(rows, options, t if options.minus_student else u, free)
    # through the logits: log_q - log_p would round at |log p| where the two nearly agree
    ratio = target if options.minus_student else torch.sub(target, own, out=t)
    # u: the target's logits less their maximum, in bits
    if options.minus_student:  # with the maximum gone nothing that matters is large, and the normaliser rounds at |t|
        shift = over.max(torch.add(s, ratio, alpha=LOG2E, out=u).amax(dim=1, keepdim=True))
        u.sub_(shift)
        shift.mul_(LN2)
    else:
        target_max = over.max(target.amax(dim=1, keepdim=True))
        torch.sub(target, target_max, out=u).mul_(LOG2E)
        shift = target_max - student_max
    target_logsum = over.sum(torch.exp2(u, out=q).sum(dim=1, keepdim=True)).log_()
    q.mul_(torch.exp(-target_logsum))
    torch.sub(ratio, shift + (target_logsum - student_logsum), out=t)
    student_logsum, target_logsum = student_logsum[:, 0], target_logsum[:, 0]
    # the likeliest entry is a common one where s + u, both less their maxima, reach 0 up to rounding
    agreeing = (torch.add(s, u, out=free).amax(dim=1) >= -1e-5).float()
    token_logprob, target_logprob = _sampled(((s, student_logsum), (u, target_logsum)), token_ids, over)
    agreeing, of_student, of_target = over.sums(
        agreeing, torch.mul(p, s, out=free).sum(dim=1), torch.mul(q, u, out=free).sum(dim=1)
    )
    student_entropy, target_entropy = student_logsum - LN2 * of_student, target_logsum - LN2 * of_target
    alpha = options.renyi
    parts = _divergence(p, q, t, options, free, more, over) if alpha is None else renyi(p, q, t, alpha, over)
    divergence, student_kl, target_kl, clip_fraction, form, factor = parts
    token_clipped = torch.zeros_like(divergence)
    if options.token_clip is not None:
        token_clipped = (divergence > options.token_clip).float()
        divergence = divergence.clamp_max(options.token_clip)
    if gradient is not None:
        grad = form()
        chain = _chain(s, student_max, grad, options) * (factor * (1.0 - token_clipped))
        if row_scale is not None:
            chain = chain * row_scale
        torch.mul(grad, chain[:, None], out=gradient)
        if row_scale is not None:  # 0 · NaN is NaN, and a masked row may hold anything
            gradient[row_scale == 0] = 0
    losses = RowLoss(
        divergence,
        student_kl,
        target_kl,
        student_entropy,
        target_entropy,
        clip_fraction,
        token_clipped,
        (agreeing > 0).float(),
        token_logprob,
    )
    return losses, target_logprob


def _sampled(
    policies: Sequence[tuple[torch.Tensor, torch.Tensor]], token_ids: torch.Tensor | None, over: Vocabulary
) -> Sequence[torch.Tensor]:
    """Log-probabilities [C] of the sampled tokens, NaN where there is none. policies: (bits, logsum) of each, the bits [C, V]
    logits less their maximum."""
    if token_ids is None:
        return [torch.full_like(logsum, float("nan")) for _, logsum in policies]
    chosen = [LN2 * bits.gather(1, token_ids.clamp_min(0)[:, None])[:, 0] - logsum for bits, logsum in policies]
    return over.of_tokens(token_ids, *(x.where(token_ids >= 0, float("nan")) for x in chosen))


def normaliser(logits: torch.Tensor, out: torch.Tensor, over: Vocabulary = WHOLE) -> tuple[torch.Tensor, torch.Tensor]:
    """max and log Σ exp(z − max), [C] each; exp(z − max) is left in ``out``."""
    maximum = over.max(logits.amax(dim=1))
    return maximum, over.sum(torch.sub(logits, maximum[:, None], out=out).mul_(LOG2E).exp2_().sum(dim=1)).log_()


def _divergence(
    p: torch.Tensor,
    q: torch.Tensor,
    t: torch.Tensor,
    options: RowOptions,
    free: torch.Tensor,
    more: torch.Tensor,
    over: Vocabulary,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Callable[[], torch.Tensor], float]:
    """Generalised JSD from p, q and t = log q − log p, [C, V]: (divergence, KL(p‖m), KL(q‖m), clip share, gradient, factor).

    f are the contributions per entry and f' = ∂f/∂log p; the gradient over the logits is f' − p·Σf': the factor times
    what the callable forms when called for. All tensors handed in are overwritten.
    """
    beta = options.beta

    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, y, out=free).sum(dim=1)  # vecdot would allocate this product anew

    clip_fraction = student_kl = target_kl = p.new_zeros(p.shape[0])
    if 0.0 < beta < 1.0:
        # log(m/p) = log1p(beta·expm1(t)) where p's share of m is the larger, else t + log1p((1 − beta)·expm1(−t)): no
        # overflow, and full relative accuracy where student and target nearly agree or beta is near 0 or 1. (Split at t = 0
        # instead, t and −t + beta·expm1(t) would cancel at small beta: loss off 5e-4 at 1e-4, 3 % at 1e-6.)
        weight: float | torch.Tensor
        if beta == 0.5:
            below, above, weight = torch.clamp_max(t, 0.0, out=more), t.clamp_min_(0.0), 0.5
        else:
            of_target = t > math.log1p(-beta) - math.log(beta)
            weight = torch.full_like(t, beta).masked_fill_(of_target, 1.0 - beta)
            below = more.copy_(t).masked_fill_(of_target, 0.0)
            above = t.sub_(below)
        tail = torch.sub(below, above, out=free).expm1_().mul_(weight).log1p_()
        log_q_over_m, log_m_over_p = below.sub_(tail), above.add_(tail)
        student_kl, target_kl = over.sums(-dot(p, log_m_over_p), dot(q, log_q_over_m))
        divergence, excess = beta * target_kl + (1.0 - beta) * student_kl, clip_fraction
    else:
        # Σ(p − q) is 0; formed from the same t it cancels the first-order effect of a rounded normaliser on a KL
        # (7e-5 → 5e-6 relative at KL 2e-3). In a JSD those effects cancel by themselves.
        difference = _difference(p, q, t, free, more)
        excess, log_ratio_mean = over.sums(difference.sum(dim=1), dot(q if beta == 0.0 else p, t))
        excess = excess if beta == 0.0 else -excess
        divergence = (log_ratio_mean if beta == 0.0 else -log_ratio_mean) + excess
        student_kl, target_kl = (student_kl, divergence) if beta == 0.0 else (divergence, target_kl)
    if options.entry_clip is None:
        if beta == 0.0:
            # less what rounding left of Σ(p − q), 2e-3 of the gradient where one entry has nearly all the mass
            return (
                divergence,
                student_kl,
                target_kl,
                clip_fraction,
                lambda: difference.addcmul_(p, excess[:, None], value=-1.0),
                1.0,
            )
        # f' = p·slope with its sum known; in reverse KL f' = p·(1 − t), whose 1 leaves no trace in f' − p·Σf'
        slope, factor, mean = (t, -1.0, log_ratio_mean) if beta == 1.0 else (log_m_over_p, beta - 1.0, -student_kl)
        return (
            divergence,
            student_kl,
            target_kl,
            clip_fraction,
            lambda: slope.sub_(mean[:, None]).mul_(p),
            factor,
        )
    if beta == 0.0:
        entries, slopes = q * t, -q
    elif beta == 1.0:
        entries, slopes = -(p * t), p * (1.0 - t)
    else:
        slopes = (p * log_m_over_p).mul_(beta - 1.0)
        entries = (q * log_q_over_m).mul_(beta).add_(slopes)
    capped = entries > options.entry_clip
    uncapped = []
    if beta in (0.0, 1.0):  # the rounded normaliser moves no entry that is capped
        uncapped = [(q if beta == 0.0 else p).masked_fill(capped, 0.0).sum(dim=1)]
    divergence = entries.clamp_max_(options.entry_clip).sum(dim=1)
    slopes.masked_fill_(capped, 0.0)
    divergence, clipped, total, *uncapped = over.sums(
        divergence, capped.sum(dim=1, dtype=torch.float32), slopes.sum(dim=1), *uncapped
    )
    return (
        divergence + excess * uncapped[0] if uncapped else divergence,
        student_kl,
        target_kl,
        clipped / over.entries(capped.shape[1]),
        lambda: slopes.addcmul_(p, total[:, None], value=-1.0),
        1.0,
    )


def _difference(
    p: torch.Tensor, q: torch.Tensor, t: torch.Tensor, free: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """p − q as sign(t)·max(p, q)·(e^−|t| − 1): the plain difference loses its digits where the two nearly agree."""
    torch.abs(t, out=out).neg_().expm1_().mul_(torch.maximum(p, q, out=free))
    return out.mul_(torch.sign(t, out=free))


def _chain(logits: torch.Tensor, maximum: torch.Tensor, gradient: torch.Tensor, options: RowOptions) -> torch.Tensor:
    """Factor [C] from logits back to raw projections; the soft cap's derivative, which varies, goes into ``gradient``.

    logits: in bits, less their ``maximum`` [C, 1], which is not; overwritten.
    """
    if options.student.softcap is not None:
        share = logits.mul_(LN2).add_(maximum).div_(options.student.softcap * options.inv_temperature)
        gradient.mul_(share.square_().neg_().add_(1.0).clamp_min_(0.0))
    return gradient.new_full((gradient.shape[0],), options.student.scale * options.inv_temperature)
