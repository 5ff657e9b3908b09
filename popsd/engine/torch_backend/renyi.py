"""The forward Rényi divergence of a block of rows, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from popsd.engine.vocabulary.reduce import Vocabulary

TERMS = 9
"""Powers of log(q/p) in the series: what comes after is below 3e-6 of it up to 1 nat."""
_LEAST = 1e-37
"""Of Z, so that where no token is possible to both the gradient is p, as in forward KL."""


def renyi(
    p: torch.Tensor, q: torch.Tensor, t: torch.Tensor, alpha: float, over: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Callable[[], torch.Tensor], float]:
    """D_α(q‖p) from p, q and t = log q − log p, [C, V]: (divergence, 0, KL(q‖p), 0, gradient p − w/Z, its factor 1).

    w = q^α·p^(1−α) and Z = Σw. Of −log Z a sum would leave few digits where p and q nearly agree, hence 1 − Z is added up:
    (1−α)p + αq − w is at least 0, is 0 to first order in t, and adds up to 1 − Z.
    """
    above = t > math.log(2.0)  # from the larger of the two: the other may have underflowed
    w = torch.where(above, q, p) * torch.exp(torch.where(above, alpha - 1.0, alpha) * t)
    near = t.clamp(-1.0, 1.0)  # a power of more may overflow
    series = torch.zeros_like(t)
    for k in range(TERMS, 1, -1):
        series.mul_(near).add_((alpha - alpha**k) / math.factorial(k))
    series.mul_(near).mul_(near).mul_(p)
    deficit = torch.where(t.abs() < 1.0, series, alpha * (q - p) - (w - p)).sum(dim=1)
    deficit, weight, target_kl = over.sums(deficit, w.sum(dim=1), (q * t).sum(dim=1))
    logarithm = torch.where(deficit < 0.5, torch.log1p(-deficit.clamp_max(0.5)), weight.log())
    z = torch.where(deficit < 0.5, 1.0 - deficit, weight).clamp_min_(_LEAST)
    nothing = torch.zeros_like(weight)

    def gradient() -> torch.Tensor:  # the plain difference would round at p, where it is p·α·t
        log_z = logarithm.clamp_min(math.log(_LEAST))[:, None]
        close = torch.expm1((alpha * t).clamp_max(1.0) - log_z).mul_(-p)
        return torch.where(above, p - w / z[:, None], close)

    return logarithm / (alpha - 1.0), nothing, target_kl, nothing, gradient, 1.0
