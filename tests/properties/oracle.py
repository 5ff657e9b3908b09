"""The equations in NumPy float64, written apart from popsd.oracle: values, and gradients by the formulas of the paper's method.

Logits are [N, V] and raw; V is the vocabulary in use. p student, q target, m = (1 − beta)·p + beta·q.
"""

from __future__ import annotations

import numpy as np


def log_softmax(z):
    top = z.max(axis=-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))


def project(hidden, weight, bias=None, scale=1.0, softcap=None):
    """A head's logits, in the model's order: projection, bias, scale, soft cap."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    return z if softcap is None else softcap * np.tanh(z / softcap)


def head_slope(logits, scale=1.0, softcap=None):
    """d logits / d projection, from the logits."""
    return scale * (np.ones_like(logits) if softcap is None else 1.0 - (logits / softcap) ** 2)


def signal(teacher, reference, options):
    """Δ̄, and which entries have one: log-ratio of teacher and reference less its mean over their common support (13, 14)."""
    log_t, log_r = (log_softmax(z / options["temperature"]) for z in (teacher, reference))
    support = np.isfinite(log_t) & np.isfinite(log_r)
    ratio = np.where(support, log_t - log_r, 0.0)
    if options["center"]:
        ratio = ratio - ratio.sum(-1, keepdims=True) / support.sum(-1, keepdims=True)
    return np.where(support, ratio, 0.0), log_t, log_r


def target(base, teacher, reference, options):
    """Unnormalised log target (15-17) with the masks on entries."""
    shift, log_t, log_r = signal(teacher, reference, options)
    if options["pmi_clip"] is not None:
        shift = options["pmi_clip"] * np.tanh(shift / options["pmi_clip"])
    if options["tail_floor"] is not None:
        floor, cap = np.log(options["tail_floor"]), options["tail_cap"]
        shift = np.where((log_t < floor) & (log_r < floor), np.clip(shift, -cap, cap), shift)
    log_b = log_softmax(base / options["temperature"])
    if options["plausibility"] is not None:
        shift = np.where(log_b < log_b.max(-1, keepdims=True) + np.log(options["plausibility"]), 0.0, shift)
    return log_b + shift / options["pmi_beta"]


def times(probability, logarithm):
    return np.where(probability > 0, probability * logarithm, 0.0)


def minus(a, b):
    """a − b of logarithms, where an entry that is impossible in both has no difference."""
    return np.where(np.isneginf(a) & np.isneginf(b), 0.0, a - b)


def jsd(student, target_logits, options):
    """Results per token [N] by name, and d loss / d student's logits [N, V] by the closed formula f' − p·Σf'."""
    beta, temperature = options["beta"], options["temperature"]
    log_p, log_q = log_softmax(student / temperature), log_softmax(target_logits)
    p, q = np.exp(log_p), np.exp(log_q)
    if beta == 0.0:
        of_p, of_q = np.zeros_like(p), times(q, minus(log_q, log_p))
        entries, slopes = of_q, -q
    elif beta == 1.0:
        of_p, of_q = times(p, minus(log_p, log_q)), np.zeros_like(p)
        entries, slopes = of_p, times(p, minus(log_p, log_q) + 1.0)
    else:
        log_m = np.logaddexp(log_p + np.log1p(-beta), log_q + np.log(beta))
        of_p, of_q = times(p, minus(log_p, log_m)), times(q, minus(log_q, log_m))
        entries, slopes = beta * of_q + (1 - beta) * of_p, (1 - beta) * of_p
    capped = np.zeros_like(entries, dtype=bool)
    if options["entry_clip"] is not None:
        capped = entries > options["entry_clip"]
        entries, slopes = np.minimum(entries, options["entry_clip"]), np.where(capped, 0.0, slopes)
    loss = entries.sum(-1)
    gradient = (slopes - p * slopes.sum(-1, keepdims=True)) / temperature
    over = np.zeros_like(loss, dtype=bool)
    if options["token_clip"] is not None:
        over = loss > options["token_clip"]
        loss, gradient = np.minimum(loss, options["token_clip"]), np.where(over[:, None], 0.0, gradient)
    results = {
        "divergence": loss,
        "student_kl": of_p.sum(-1),
        "target_kl": of_q.sum(-1),
        "student_entropy": -times(p, log_p).sum(-1),
        "target_entropy": -times(q, log_q).sum(-1),
        "clip_fraction": capped.mean(-1),
        "token_clipped": over.astype(float),
    }
    return results, gradient


def token_logprob(student, ids, options):
    log_p = log_softmax(student / options["temperature"])
    return np.where(ids >= 0, log_p[np.arange(len(ids)), np.maximum(ids, 0)], np.nan)


def decompose(student, teacher, reference, options):
    """Norms, cosines and ratio of Δ_total, Δ_ref, Δ_it (4): raw, less their means, and weighted by the student."""
    logs = [log_softmax(z / options["temperature"]) for z in (student, teacher, reference)]
    inside = np.all([np.isfinite(x) for x in logs], axis=0)
    s, t, r = (np.where(inside, x, 0.0) for x in logs)
    parts = [t - s, r - s, t - r]
    count = inside.sum(-1, keepdims=True)
    centred = [np.where(inside, x - x.sum(-1, keepdims=True) / count, 0.0) for x in parts]
    weighted = [x * np.sqrt(np.exp(logs[0])) for x in parts]
    results = {}
    for prefix, (total, induced, transferable) in (("", parts), ("centred_", centred), ("weighted_", weighted)):
        norms = [np.sqrt((x * x).sum(-1)) for x in (total, induced, transferable)]
        for name, norm in zip(("total", "reference", "transferable"), norms, strict=True):
            results[f"{prefix}{name}_norm"] = norm
    return results


def purification(base, teacher, reference, options):
    log_target = log_softmax(target(base, teacher, reference, options))
    log_b, log_t = (log_softmax(z / options["temperature"]) for z in (base, teacher))
    q = np.exp(log_target)
    size = np.sort(np.abs(signal(teacher, reference, options)[0]), axis=-1)
    vocab = size.shape[-1]
    results = {f"delta_{name}": size[:, int(np.ceil(share * vocab)) - 1] for name, share in QUANTILES.items()}
    return results | {
        "target_teacher_kl": times(q, minus(log_target, log_t)).sum(-1),
        "target_base_kl": times(q, minus(log_target, log_b)).sum(-1),
        "mass_moved": 0.5 * np.abs(q - np.exp(log_b)).sum(-1),
    }


QUANTILES = {"median": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}
