"""What the Triton kernels say of this rank's entries, merged with what they say elsewhere.

They can take a row in slices, of which each leaves its normalisers, then its sums, then the gradient: what the slices of other
ranks have left comes in between those launches. The other kernels see a shard as if it were all, and their results are merged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from popsd.engine.vocabulary.reduce import Vocabulary
from popsd_kernels.rows import LOGIT_FLOOR, RowOptions, RowStatistics

LOG2E = 1.4426950408889634
NORMALISERS = len(RowStatistics._fields)


def between_launches(over: Vocabulary, options: RowOptions, held: int) -> Callable[[int, torch.Tensor], None]:
    """``between`` of `popsd_kernels.row_split_sweeps`, for rows of which this rank holds so many entries."""
    from popsd_kernels.device.row_loss import Sums

    used = used_sums(options)

    def between(launch: int, partials: torch.Tensor) -> None:
        if launch == 1:
            tops, totals = partials[:, 0:NORMALISERS:2], partials[:, 1:NORMALISERS:2]
            most = over.max(tops.amax(dim=2))
            # as the kernels do it: the exponents are less the rounded product of the maximum
            share = torch.exp2(tops * LOG2E - (most * LOG2E)[:, :, None])
            total = over.sum((totals * share).sum(dim=2))
            _leave(tops, most, LOGIT_FLOOR)
            _leave(totals, total, 0.0)
            return
        sums = dict(zip(Sums._fields, partials[:, NORMALISERS:].unbind(1), strict=True))
        _leave(sums["top"], over.max(sums["top"].amax(dim=1)), LOGIT_FLOOR)
        for name, total in zip(used, over.sums(*(sums[name].sum(dim=1) for name in used)), strict=True):
            # the kernel divides the number of capped entries by what this rank holds
            _leave(sums[name], total * held / over.total if name == "capped" else total, 0.0)

    return between


def used_sums(options: RowOptions) -> list[str]:
    """Of the sums that slices leave, those that add up and may be other than 0."""
    from popsd_kernels.device.row_loss import Sums

    unused = {"top"}  # no sum
    if options.renyi is None and options.beta in (0.0, 1.0):
        unused.add("student_kl" if options.beta == 0.0 else "target_kl")
    if options.entry_clip is None:
        unused |= {"clipped_divergence", "capped"} | ({"slope"} if options.renyi is None else set())
    return [name for name in Sums._fields if name not in unused]


def whole_statistics(statistics: RowStatistics, over: Vocabulary) -> RowStatistics:
    """Normalisers of whole rows."""
    own_max, own_logsum = torch.stack(statistics[0::2]), torch.stack(statistics[1::2])
    most, total = _whole_normalisers(own_max, own_logsum, over)
    return RowStatistics(most[0], total[0].log(), most[1], total[1].log())


def whole_offset(mean: torch.Tensor, impossible: torch.Tensor | None, held: int, over: Vocabulary) -> torch.Tensor:
    """The mean [C] of a row's teacher − reference, from that of the ``held`` entries which are not ``impossible`` [held]."""
    count = torch.full_like(mean, held)
    if impossible is not None:
        count -= impossible.sum()
    total, count = over.sums(torch.where(count > 0, mean * count, 0.0), count)
    return total / count.clamp_min(1)


def whole_moments(shard: torch.Tensor, over: Vocabulary) -> torch.Tensor:
    """`popsd_kernels.row_moments` [13, C] of whole rows, from `popsd_kernels.shard_moments` [21, C].

    Products are moved from the shard's own means and normalisers to those of the row before they are added up.
    """
    centred, weighted, (a, b, count), firsts = shard[:5], shard[5:10], shard[10:13], shard[13:15]
    tops, logsums = shard[15::2], shard[16::2]  # of student, reference, teacher
    most, total = _whole_normalisers(tops, logsums, over)
    held = count > 0
    shift = [(tops[k] - tops[0]) + (logsums[k] - logsums[0]) for k in (2, 1)]
    means = [mean + own for mean, own in zip((a, b), shift, strict=True)]
    x_sum, y_sum, entries = over.sums(*(torch.where(held, count * mean, 0.0) for mean in means), count)
    inside = entries.clamp_min(1.0)  # of no common entry every field is 0
    whole_means = x_sum / inside, y_sum / inside
    whole_shift = [(most[k] - most[0]) + (total[k] / total[0]).log() for k in (2, 1)]
    zero = torch.zeros_like(count)
    moved = _moved(centred, (zero, zero), count, [own - whole for own, whole in zip(means, whole_means, strict=True)])
    share = torch.exp(logsums[0] + (tops[0] - most[0])) / total[0]
    steps = [own - whole for own, whole in zip(shift, whole_shift, strict=True)]
    moved += [share * x for x in _moved(weighted, firsts.unbind(), torch.ones_like(count), steps)]
    sums = over.sums(*(torch.where(held, x, 0.0) for x in moved))
    a, b = (mean - own for mean, own in zip(whole_means, whole_shift, strict=True))
    with_reference = [sums[k] - sums[k + 3] for k in (0, 4)]
    return torch.stack([*sums[:3], with_reference[0], sums[3], *sums[4:7], with_reference[1], sums[7], a, b, entries])


def _moved(
    products: torch.Tensor, firsts: tuple[torch.Tensor, ...], weight: torch.Tensor, steps: list[torch.Tensor]
) -> list[torch.Tensor]:
    """‖x‖², ‖y‖², ‖z‖² and x·z of values that are larger by ``steps``, z = x − y. firsts: Σ x and Σ y. weight: Σ 1."""
    (x, y), (dx, dy) = firsts, steps
    z, dz = x - y, dx - dy
    xx, yy, zz, _, xz = products
    squares = [own + d * (2.0 * first + d * weight) for own, first, d in ((xx, x, dx), (yy, y, dy), (zz, z, dz))]
    return [*squares, xz + dz * x + dx * z + dx * dz * weight]


def _whole_normalisers(
    tops: torch.Tensor, logsums: torch.Tensor, over: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """max and Σ exp(z − max) of whole rows, from max and log Σ exp(z − max) of the shards."""
    most = over.max(tops)
    return most, over.sum(torch.exp(logsums + (tops - most)))


def _leave(partials: torch.Tensor, whole: torch.Tensor, nothing: float) -> None:
    """The number of a whole row as its first slice's, and ``nothing`` as that of the others. partials: [..., slices]."""
    partials.fill_(nothing)
    partials[..., 0] = whole
