"""What the purified target does to a token: how hard the soft clip works, and how far the target leaves base and teacher."""

from __future__ import annotations

import math

import torch

from popsd.engine.torch_backend.supports import NEGLIGIBLE
from popsd.engine.torch_backend.sweeps import normaliser
from popsd.engine.vocabulary.reduce import Vocabulary
from popsd_kernels.rows import LOGIT_FLOOR

QUANTILES = (0.5, 0.9, 0.99)


def size_rows(size: torch.Tensor, pmi_clip: float | None, over: Vocabulary) -> list[torch.Tensor]:
    """Saturation, the three quantiles and the maximum of |Δ̄| [C, V]: [C] each."""
    saturation = torch.zeros_like(size[:, 0])
    if pmi_clip is not None:
        saturation = over.sum((size > pmi_clip).sum(dim=1, dtype=torch.float32)) / over.entries(size.shape[1])
    if over.group is not None:
        return [saturation, *_quantiles_of_shards(size, over), over.max(size.amax(dim=1))]
    vocab, rows, largest = size.shape[1], [saturation], size
    for share in QUANTILES:  # each among what the one before left: half the time of three `kthvalue`s (torch 2.13, CPU)
        largest = largest.topk(vocab - math.ceil(share * vocab) + 1, dim=1, sorted=False).values
        rows.append(largest.amin(dim=1))
    return [*rows, largest.amax(dim=1)]


def _quantiles_of_shards(size: torch.Tensor, over: Vocabulary) -> list[torch.Tensor]:
    """The smallest values of the row that the shares do not exceed, to the last bit, from a count per share and round.

    As whole numbers the bits of floats of at least 0 are in the floats' own order, so that 31 halvings find a value.
    """
    bits = size.view(torch.int32)
    ranks = [math.ceil(share * over.total) for share in QUANTILES]
    low = torch.zeros(len(ranks), size.shape[0], dtype=torch.int32, device=size.device)
    high = torch.full_like(low, torch.iinfo(torch.int32).max)
    for _ in range(31):
        middle = low + (high - low) // 2
        counts = over.sums(*((bits <= bound[:, None]).sum(dim=1) for bound in middle))
        reached = torch.stack([count >= rank for count, rank in zip(counts, ranks, strict=True)])
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return list(high.view(torch.float32).unbind())


def movement_rows(
    base: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    over: Vocabulary,
) -> list[torch.Tensor]:
    """KL(target‖teacher), KL(target‖base), total variation of target and base, and whether their arg-max differs: [C] each.

    base, teacher, target: tempered float32 logits [C, V]. p, q: two more of their shape, overwritten.
    """
    of_teacher, of_base, of_target = (normaliser(z, out, over) for z, out in ((teacher, p), (base, p), (target, q)))
    changed = (_likeliest(target, of_target[0], over) != _likeliest(base, of_base[0], over)).float()
    for x, (_, logsum) in ((p, of_base), (q, of_target)):
        x.mul_(torch.exp(-logsum)[:, None])
    parts = [torch.sub(q, p, out=p).abs_().sum(dim=1)]
    for other in (teacher, base):
        parts.append(torch.sub(target, other, out=p).mul_(q).sum(dim=1))
        impossible = other < 1e-6 * LOGIT_FLOOR  # whatever scale or temperature the floor went through
        parts.append((impossible & (target > of_target[0][:, None] - NEGLIGIBLE)).any(dim=1).float())
    moved, *sums = over.sums(*parts)
    divergences = []
    for (maximum, logsum), difference, disjoint in zip((of_teacher, of_base), sums[::2], sums[1::2], strict=True):
        shift = (of_target[0] - maximum) + (of_target[1] - logsum)
        divergences.append((difference - shift).masked_fill_(disjoint > 0, torch.inf))
    return [*divergences, 0.5 * moved, changed]


def _likeliest(logits: torch.Tensor, maximum: torch.Tensor, over: Vocabulary) -> torch.Tensor:
    """The first entry of the row that has its ``maximum`` [C], [C]; -1 without one, in a row of NaN."""
    own, entry = logits.max(dim=1)
    place = torch.where(own == maximum, -1.0 - over.first - entry, -torch.inf)
    return over.max(place)
