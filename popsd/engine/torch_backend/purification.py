"""What the purified target does to a token: how hard the soft clip works, and how far the target leaves base and teacher."""

from __future__ import annotations

import math

import torch

from popsd.engine.torch_backend.supports import NEGLIGIBLE
from popsd.engine.torch_backend.sweeps import normaliser
from popsd_kernels.rows import LOGIT_FLOOR

QUANTILES = (0.5, 0.9, 0.99)


def size_rows(size: torch.Tensor, pmi_clip: float | None) -> list[torch.Tensor]:
    """Saturation, the three quantiles and the maximum of |Δ̄| [C, V]: [C] each."""
    vocab = size.shape[1]
    rows = [
        torch.zeros_like(size[:, 0]) if pmi_clip is None else (size > pmi_clip).sum(dim=1, dtype=torch.float32) / vocab
    ]
    largest = size
    for share in QUANTILES:  # each among what the one before left: half the time of three `kthvalue`s (torch 2.13, CPU)
        largest = largest.topk(vocab - math.ceil(share * vocab) + 1, dim=1, sorted=False).values
        rows.append(largest.amin(dim=1))
    return [*rows, largest.amax(dim=1)]


def movement_rows(
    base: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, p: torch.Tensor, q: torch.Tensor
) -> list[torch.Tensor]:
    """KL(target‖teacher), KL(target‖base), total variation of target and base, and whether their arg-max differs: [C] each.

    base, teacher, target: tempered float32 logits [C, V]. p, q: two more of their shape, overwritten.
    """
    changed = (target.argmax(dim=1) != base.argmax(dim=1)).float()
    of_teacher, of_base, of_target = (normaliser(z, out) for z, out in ((teacher, p), (base, p), (target, q)))
    for x, (_, logsum) in ((p, of_base), (q, of_target)):
        x.mul_(torch.exp(-logsum)[:, None])
    moved = 0.5 * torch.sub(q, p, out=p).abs_().sum(dim=1)
    divergences = []
    for (maximum, logsum), other in ((of_teacher, teacher), (of_base, base)):
        shift = (of_target[0] - maximum) + (of_target[1] - logsum)
        impossible = other < 1e-6 * LOGIT_FLOOR  # whatever scale or temperature the floor went through
        disjoint = (impossible & (target > of_target[0][:, None] - NEGLIGIBLE)).any(dim=1)
        divergence = torch.sub(target, other, out=p).mul_(q).sum(dim=1) - shift
        divergences.append(divergence.masked_fill_(disjoint, torch.inf))
    return [*divergences, moved, changed]
