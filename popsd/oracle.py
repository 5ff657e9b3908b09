"""The executable statement of the method: float64, dense, equation by equation (arXiv 2607.02234), no tricks.

Everything takes raw logits [..., V] of any dtype and computes in float64. Kernels are changed to match this file, never
the other way round. It materialises every vocabulary-wide tensor: use it to check, not to train.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from popsd.config import DivergenceConfig, PurifiedConfig
from popsd.head import Head
from popsd.outputs import Decomposition, Purification, SparseTarget


def head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """[..., D] → [..., V] float64 logits in the model's own order: projection, bias, scale, soft cap."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def log_probs(logits: torch.Tensor, config: DivergenceConfig) -> torch.Tensor:
    """log softmax over the vocabulary in use, at the configured temperature."""
    return torch.log_softmax(logits.double()[..., : config.vocab_size] / config.temperature, dim=-1)


def purified_target_logits(
    base: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor, config: PurifiedConfig
) -> torch.Tensor:
    """Unnormalised log target, Eq. 13-17. Entries outside the support of teacher or reference carry no signal: Δ̃ = 0."""
    log_base, log_teacher, log_reference = (log_probs(x, config) for x in (base, teacher, reference))
    delta = centred_difference(teacher, reference, config)
    if config.pmi_clip is not None:
        delta = config.pmi_clip * torch.tanh(delta / config.pmi_clip)  # Eq. 15
    if config.tail_floor is not None and config.tail_cap is not None:
        faint = (log_teacher < math.log(config.tail_floor)) & (log_reference < math.log(config.tail_floor))
        delta = torch.where(faint, delta.clamp(-config.tail_cap, config.tail_cap), delta)
    if config.plausibility is not None:
        delta = torch.where(log_base < log_base.amax(-1, keepdim=True) + math.log(config.plausibility), 0.0, delta)
    return log_base + delta / config.pmi_beta  # Eq. 16


def arithmetic_mix(base: torch.Tensor, teacher: torch.Tensor, share: float, config: DivergenceConfig) -> torch.Tensor:
    """log((1 − share)·π_0 + share·π_T) from raw logits [..., V]."""
    return torch.log((1.0 - share) * log_probs(base, config).exp() + share * log_probs(teacher, config).exp())


def alpha_mix(base: torch.Tensor, teacher: torch.Tensor, alpha: float, config: DivergenceConfig) -> torch.Tensor:
    """log(π_0^(1−α)·π_T^α) up to a constant of the token, from raw logits [..., V], α in (0, 1]."""
    log_base, log_teacher = log_probs(base, config), log_probs(teacher, config)
    return alpha * log_teacher if alpha == 1.0 else (1.0 - alpha) * log_base + alpha * log_teacher  # 0 · log 0 = 0


def centred_difference(teacher: torch.Tensor, reference: torch.Tensor, config: PurifiedConfig) -> torch.Tensor:
    """Δ̄ of raw logits [..., V], Eq. 13 and 14; 0 outside the support."""
    log_teacher, log_reference = log_probs(teacher, config), log_probs(reference, config)
    support = torch.isfinite(log_teacher) & torch.isfinite(log_reference)
    delta = torch.where(support, log_teacher, 0.0) - torch.where(support, log_reference, 0.0)  # Eq. 13
    if config.center:
        delta = delta - delta.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)  # Eq. 14
    return torch.where(support, delta, 0.0)


def purification(
    base: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor, config: PurifiedConfig
) -> Purification:
    """The fields of `Purification` from raw logits [..., V], per token."""
    target_logits = purified_target_logits(base, teacher, reference, config)
    log_target = torch.log_softmax(target_logits, dim=-1)
    log_base, log_teacher = log_probs(base, config), log_probs(teacher, config)
    size = centred_difference(teacher, reference, config).abs()
    ordered, vocab, target = size.sort(dim=-1).values, size.shape[-1], log_target.exp()
    clip = math.inf if config.pmi_clip is None else config.pmi_clip
    return Purification(
        (size > clip).double().mean(-1),
        ordered[..., math.ceil(0.5 * vocab) - 1],
        ordered[..., math.ceil(0.9 * vocab) - 1],
        ordered[..., math.ceil(0.99 * vocab) - 1],
        ordered[..., -1],
        _times(target, log_target - log_teacher).sum(-1),
        _times(target, log_target - log_base).sum(-1),
        0.5 * (target - log_base.exp()).abs().sum(-1),
        (target_logits.argmax(-1) != log_base.argmax(-1)).double(),
    )


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, config: DivergenceConfig) -> torch.Tensor:
    """Generalised JSD of student p and target q per token, Eq. 12 and 18, with both clips. [..., V] log-probs → [...].

    Or with ``renyi_alpha`` D_α(q‖p) = −log Σ_v q^α·p^(1−α) / (1 − α).
    """
    beta, alpha = config.beta, config.renyi_alpha
    if alpha is not None:
        loss = torch.logsumexp(alpha * log_q + (1.0 - alpha) * log_p, dim=-1) / (alpha - 1.0)
        return loss if config.token_clip is None else loss.clamp(max=config.token_clip)
    outside = torch.isneginf(log_p) & torch.isneginf(log_q)  # impossible in both: contributes nothing
    log_p, log_q = log_p.masked_fill(outside, 0.0), log_q.masked_fill(outside, 0.0)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        entries = _times(q, log_q - log_p)
    elif beta == 1.0:
        entries = _times(p, log_p - log_q)
    else:
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        entries = beta * _times(q, log_q - log_m) + (1.0 - beta) * _times(p, log_p - log_m)
    if config.entry_clip is not None:
        entries = entries.clamp(max=config.entry_clip)
    loss = entries.sum(-1)
    return loss if config.token_clip is None else loss.clamp(max=config.token_clip)


def jsd(student: torch.Tensor, target: torch.Tensor, config: DivergenceConfig) -> torch.Tensor:
    """Divergence of two sets of raw logits [..., V], per token."""
    return divergence(log_probs(student, config), log_probs(target, config), config)


def jsd_of_rows(
    student: torch.Tensor, target: torch.Tensor, beta: torch.Tensor, config: DivergenceConfig
) -> torch.Tensor:
    """`jsd` of [B, T, V] logits with a coefficient per completion, ``beta`` [B]."""
    rows = zip(student, target, beta.tolist(), strict=True)
    return torch.stack([jsd(own, other, replace(config, beta=value)) for own, other, value in rows])


def purified_jsd(
    student: torch.Tensor, base: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor, config: PurifiedConfig
) -> torch.Tensor:
    """The purified loss per token from four sets of raw logits [..., V], Eq. 12-18."""
    target = torch.log_softmax(purified_target_logits(base, teacher, reference, config), dim=-1)
    return divergence(log_probs(student, config), target, config)


def sparse_jsd(
    student: torch.Tensor, target: SparseTarget, config: DivergenceConfig, *, add_tail: bool = True
) -> torch.Tensor:
    """Divergence per token of raw logits [..., V] to a target known at k entries, over these and all others as one (the tail).

    Without the tail both are renormalised over the k entries. The target's temperature is its own.
    """
    ids, log_q = target.ids, target.log_probs.double()
    log_p = log_probs(student, config)
    listed = (ids >= 0) & (log_q > -math.inf)
    earlier = torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool, device=ids.device).tril(-1)
    same = (ids[..., :, None] == ids[..., None, :]) & listed[..., None, :] & earlier
    listed = listed & ~same.any(-1)  # an id's first place counts
    is_listed = torch.zeros_like(log_p, dtype=torch.long).scatter_add_(-1, ids.clamp_min(0), listed.long()) > 0
    log_p_tail = torch.logsumexp(log_p.masked_fill(is_listed, -math.inf), dim=-1, keepdim=True)
    log_p = log_p.gather(-1, ids.clamp_min(0)).masked_fill(~listed, -math.inf)
    log_q = log_q.masked_fill(~listed, -math.inf)
    if add_tail:
        mass = torch.logsumexp(log_q, dim=-1, keepdim=True).clamp(max=-1e-7)
        log_q_tail = torch.log(-torch.expm1(mass)).masked_fill(is_listed.all(-1, keepdim=True), -math.inf)
        log_p, log_q = torch.cat([log_p, log_p_tail], dim=-1), torch.cat([log_q, log_q_tail], dim=-1)
    log_p, log_q = (x - torch.logsumexp(x, dim=-1, keepdim=True).clamp_min(-1e300) for x in (log_p, log_q))
    return divergence(log_p, log_q, config)


def sampled(log_p: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """log p of the sampled tokens: [..., V] log-probabilities and [...] ids → [...]; NaN of an id of -1."""
    chosen = log_p.gather(-1, token_ids.clamp_min(0)[..., None])[..., 0]
    return chosen.where(token_ids >= 0, math.nan)


def return_to_go(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ_{s ≥ t} (log π_θ(y_s) − log target(y_s)) from the sampled tokens' log-probabilities [..., T]."""
    return torch.stack([(log_p - log_q)[..., t:].sum(-1) for t in range(log_p.shape[-1])], dim=-1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats of [..., V] log-probabilities."""
    return -_times(log_p.exp(), log_p).sum(-1)


def decompose(
    student: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor, config: DivergenceConfig
) -> Decomposition:
    """Eq. 4 from raw logits [..., V]: norms and cosines over the vocabulary of Δ_total = Δ_ref + Δ_it, per token.

    Then the same of every Δ less its mean over the vocabulary, and with each entry weighted by π_θ.
    """
    log_student, log_teacher, log_reference = (log_probs(x, config) for x in (student, teacher, reference))
    outside = torch.isinf(log_student) | torch.isinf(log_teacher) | torch.isinf(log_reference)
    total = (log_teacher - log_student).masked_fill(outside, 0.0)
    induced = (log_reference - log_student).masked_fill(outside, 0.0)
    transferable = (log_teacher - log_reference).masked_fill(outside, 0.0)
    signals = (total, induced, transferable)
    count = (~outside).sum(-1, keepdim=True)
    centred = ((x - x.sum(-1, keepdim=True) / count).masked_fill(outside, 0.0) for x in signals)
    weighted = (x * log_student.exp().sqrt() for x in signals)
    return Decomposition(*_parts(*signals), *_parts(*centred), *_parts(*weighted))


def _parts(total: torch.Tensor, induced: torch.Tensor, transferable: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total_norm, induced_norm, transferable_norm = (x.norm(dim=-1) for x in (total, induced, transferable))
    return (
        total_norm,
        induced_norm,
        transferable_norm,
        _ratio((total * induced).sum(-1), total_norm * induced_norm).clamp(-1.0, 1.0),
        _ratio((total * transferable).sum(-1), total_norm * transferable_norm).clamp(-1.0, 1.0),
        _ratio(induced_norm, total_norm),
    )


def _times(probability: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """0 · log 0 = 0."""
    return torch.where(probability > 0, probability * log_ratio, 0.0)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
