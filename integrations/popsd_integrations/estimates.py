"""Means with bootstrap intervals, paired differences, pass@k and the majority's answer.

The unit that is resampled is a problem (or a completion), never a token or one of a problem's samples. Samples of one problem
are alike, and an interval that took them for independent would be far too narrow. Values come in groups, such as benchmarks.
Each group is resampled by itself, and what is estimated is the mean of the groups' means.

A plain percentile interval of a mean over 30 problems covers about 94 % where 95 % are promised, and less over fewer.
Resampling loses the factor n / (n − 1) of the variance, and the tails are the normal's instead of Student's t. Both are put
right as in Hesterberg, "What teachers should know about the bootstrap" (2014).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
    """A mean and its interval. low and high are None where the data cannot say: a group of one, or values all equal."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    groups: Sequence[Sequence[float]],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """The mean of the groups' means. groups: the values of each. within: the range that a mean can take, such as (0, 1).

    Raises ValueError for an empty group.

    >>> print(bootstrap([[0.0, 1.0, 1.0, 0.5] * 10], within=(0, 1)))
    0.625 [0.486, 0.752]
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("groups: expected at least one value in each group; got none.")
    arrays = [np.asarray(group, dtype=float) for group in groups]
    mean = float(np.mean([array.mean() for array in arrays]))
    variances = np.array([array.var(ddof=1) / len(array) if len(array) > 1 else math.nan for array in arrays])
    if not variances.sum() > 0:  # nan too
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    deviations = sum(_deviations(array, resamples, rng) for array in arrays) / len(arrays)
    sizes = np.array([len(array) for array in arrays])
    # Welch and Satterthwaite's degrees of freedom of a sum of means
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    tail = (1 - level) / 2
    widened = NormalDist().cdf(student_quantile(tail, freedom))
    low, high = mean + np.quantile(deviations, [widened, 1 - widened])
    return Interval(mean, max(float(low), within[0]), min(float(high), within[1]))


def _deviations(array: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Of resampled means from the mean, [resamples]."""
    n = len(array)
    means = array[rng.integers(n, size=(resamples, n))].mean(axis=1)
    return (means - array.mean()) * math.sqrt(n / (n - 1))


def paired_difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of ours − theirs, where both hold the same problems in the same order. Raises ValueError where they do not.

    Problems differ far more than checkpoints do, so this interval is narrower than the two means' own suggest.
    """
    if [len(group) for group in ours] != [len(group) for group in theirs]:
        raise ValueError("ours, theirs: expected the same problems in both; got other numbers of them.")
    differences = [np.subtract(a, b).tolist() for a, b in zip(ours, theirs, strict=True)]
    return bootstrap(differences, level=level, seed=seed)


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Σ numerators / Σ denominators, where each pair is of one problem or completion, and pairs are what is resampled.
    within: as for `bootstrap`.

    The bootstrap is of what the ratio loses without each pair (the jackknife). The interval is then as wide as Student's t of
    (Σd)² / Σd² pairs has it, for a few long completions decide. Of 24 completions whose lengths differ by factors of ten it
    covers 95 %; a plain bootstrap of the residuals covers 90 %.
    Raises ValueError where the denominators do not sum to more than 0.

    >>> print(ratio([1.0, 2.0, 4.0, 2.0], [2.0, 4.0, 6.0, 4.0]))
    0.562 [0.441, 0.866]
    """
    above, below = (np.asarray(values, dtype=float) for values in (numerators, denominators))
    total = below.sum()
    if not total > 0:
        raise ValueError(f"denominators: expected a positive sum; got {total}.")
    value = float(above.sum() / total)
    rest = np.maximum(total - below, np.finfo(float).tiny)  # a pair that is all there is has no residual
    lost = len(above) * (above - value * below) / rest
    found = bootstrap([lost.tolist()], level=level, seed=seed)
    if found.low is None or found.high is None:
        return Interval(value, None, None)
    tail, deciding = (1 - level) / 2, float(total**2 / (below**2).sum())
    wider = student_quantile(tail, max(deciding - 1, 1)) / student_quantile(tail, len(above) - 1)
    low, high = (value + wider * (end - found.mean) for end in (found.low, found.high))
    return Interval(value, max(low, within[0]), min(high, within[1]))


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, by the expansion of Cornish and Fisher to the fourth order (Abramowitz and Stegun 26.7.5).

    The error at probability 0.025 is below 0.001 from 5 degrees of freedom on, and 0.03 at 2.
    """
    z, n = NormalDist().inv_cdf(probability), freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """P(at least one of k samples is right), without bias from ``samples`` drawn: 1 − C(n − c, k) / C(n, k).

    Source: Chen et al., arXiv 2107.03374. Raises ValueError where k is not in 1..samples.

    >>> pass_at_k(12, 3, 1), pass_at_k(12, 10, 3)
    (0.25, 1.0)
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"k: expected 1 ≤ k ≤ samples and 0 ≤ correct ≤ samples; got {k}, {samples}, {correct}.")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable], correct: Sequence[bool]) -> float:
    """P(the most frequent answer is right). Equally frequent answers share the vote.

    answers: None is no answer and no vote. Answers that are right are one answer, however they are written.

    >>> majority(["1/2", "0.5", "3", "3"], [True, True, False, False])
    0.5
    """
    votes: dict[Hashable, int] = defaultdict(int)
    for answer, right in zip(answers, correct, strict=True):
        if right or answer is not None:
            votes["right" if right else ("wrong", answer)] += 1
    if not votes:
        return 0.0
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    return ("right" in first) / len(first)


def sampling_error(rates: Sequence[Sequence[float]], samples: int) -> float | None:
    """Standard error of the mean of the groups' means from the samples alone, the problems being fixed.

    rates: shares of right answers of each problem. Each has variance p(1 − p)/k, which (k − 1) in the divisor estimates
    without bias. None for one sample per problem, which cannot say.
    """
    if samples < 2:
        return None
    variances = [np.mean(np.multiply(group, 1 - np.asarray(group))) / (samples - 1) / len(group) for group in rates]
    return math.sqrt(sum(variances)) / len(rates)


def selection_gain(candidates: int) -> float:
    """Expected maximum of so many standard normals: in standard errors, what choosing the best of equals gains by itself.

    >>> [round(selection_gain(m), 2) for m in (1, 2, 4)]
    [0.0, 0.56, 1.03]
    """
    step = 0.01
    x = np.arange(-8, 8, step) + step / 2
    below = np.array([NormalDist().cdf(value) for value in x]) ** candidates
    # E max = ∫ (1 − F(x)^m) over x > 0, less ∫ F(x)^m over x < 0
    return float(np.where(x > 0, 1 - below, -below).sum() * step)
