import itertools
import math

import numpy as np
import pytest

from popsd_integrations.estimates import (
    bootstrap,
    majority,
    paired_difference,
    pass_at_k,
    ratio,
    sampling_error,
    selection_gain,
    student_quantile,
)


def rates(rng, problems, samples=12):
    """Shares of right answers as on AIME: most problems are nearly always solved or nearly never. The mean is 6/11."""
    return rng.binomial(samples, rng.beta(0.6, 0.5, problems)) / samples


def coverage(sizes, repetitions, seed):
    rng, truth, hits = np.random.default_rng(seed), 0.6 / 1.1, 0
    for repetition in range(repetitions):
        found = bootstrap([rates(rng, size) for size in sizes], seed=repetition, resamples=1000)
        hits += found.low <= truth <= found.high
    return hits / repetitions


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(30,), (30, 30, 30), (12,)])
def test_intervals_cover_what_they_promise(sizes):
    assert 0.93 <= coverage(sizes, 2500, seed=1) <= 0.97


def test_intervals_of_the_mean_of_benchmarks():
    rng = np.random.default_rng(0)
    groups = [rates(rng, 30), rates(rng, 400)]
    found = bootstrap(groups)
    assert found.mean == pytest.approx((groups[0].mean() + groups[1].mean()) / 2)
    # half of the first group's, which is far wider than the second's
    alone = bootstrap(groups[:1])
    assert (found.high - found.low) / (alone.high - alone.low) == pytest.approx(0.5, abs=0.06)
    assert bootstrap([[0.0] * 29 + [1.0]], within=(0, 1)).low == 0
    assert bootstrap(groups) == found != bootstrap(groups, seed=1)


def completions(rng, count, spread):
    """Markers' probability under base and target, summed over completions whose lengths differ. The ratio is 1.04."""
    base = rng.lognormal(5, spread, count) * rng.gamma(2, 0.005, count)
    return base * rng.normal(1.04, 0.2, count), base


@pytest.mark.parametrize(
    ("count", "spread", "repetitions"),
    [(24, 0.6, 150), *(pytest.param(n, s, 1200, marks=pytest.mark.slow) for n in (12, 24, 64) for s in (0.1, 0.6))],
)
def test_intervals_of_a_ratio_cover_what_they_promise(count, spread, repetitions):
    rng, hits = np.random.default_rng(1), 0
    for repetition in range(repetitions):
        found = ratio(*completions(rng, count, spread), seed=repetition)
        hits += found.low <= 1.04 <= found.high
    assert abs(hits / repetitions - 0.95) <= 0.02 + 1.5 * math.sqrt(0.05 * 0.95 / repetitions)


def test_a_ratio_counts_by_the_denominator():
    found = ratio([1.0, 30.0], [1.0, 10.0])
    assert found.mean == 31 / 11 and found.low < 31 / 11 < found.high
    assert ratio([1.0, 30.0], [1.0, 10.0], within=(2.5, 3)) == (31 / 11, 2.5, 3)
    assert ratio([2.0], [4.0]) == (0.5, None, None) and ratio([3.0, 0.0], [4.0, 0.0]).low is None
    with pytest.raises(ValueError, match=r"denominators: expected a positive sum; got 0"):
        ratio([1.0], [0.0])


def test_what_cannot_be_estimated_has_no_interval():
    for group in ([0.5], [1.0, 1.0, 1.0]):
        assert bootstrap([group])[1:] == (None, None) and str(bootstrap([group])) == f"{group[0]:.3f}"
    assert bootstrap([[0.5], [0.0, 1.0]]).low is None
    with pytest.raises(ValueError, match=r"groups: expected at least one value"):
        bootstrap([[1.0], []])


def test_paired_differences_are_narrower_than_the_means():
    rng = np.random.default_rng(2)
    base = rates(rng, 60)
    trained = np.clip(base + rng.normal(0.05, 0.05, 60), 0, 1)
    difference, alone = paired_difference([trained], [base]), bootstrap([trained])
    assert difference.low < (trained - base).mean() < difference.high
    assert difference.high - difference.low < (alone.high - alone.low) / 3
    with pytest.raises(ValueError, match=r"ours, theirs: expected the same problems"):
        paired_difference([trained], [base[:-1]])


def test_quantiles_of_student():
    for freedom, expected in ((3, -3.182446), (5, -2.570582), (10, -2.228139), (29, -2.045230)):
        assert student_quantile(0.025, freedom) == pytest.approx(expected, abs=0.004 if freedom < 5 else 0.001)


@pytest.mark.parametrize(("samples", "correct"), [(6, 0), (6, 1), (6, 4), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, correct):
    right = [True] * correct + [False] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_names_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"expected 1 ≤ k ≤ samples"):
        pass_at_k(4, 1, 5)


def test_majority():
    assert majority(["1", "1", "2"], [True, True, False]) == 1
    assert majority(["1", "2", "2"], [True, False, False]) == 0
    assert majority(["1", "2", "3"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority([None, None, "1"], [False, False, True]) == 1  # no answer is no vote
    assert majority([None], [False]) == 0


def test_noise_of_the_samples_and_of_choosing_the_best():
    rng = np.random.default_rng(3)
    truth = rng.beta(0.6, 0.5, 30)
    means = [(rng.binomial(12, truth) / 12).mean() for _ in range(4000)]
    errors = [sampling_error([rng.binomial(12, truth) / 12], 12) for _ in range(200)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)
    assert sampling_error([truth] * 3, 12) == pytest.approx(sampling_error([truth], 12) / math.sqrt(3))
    assert sampling_error([truth], 1) is None
    best = rng.normal(size=(100_000, 4)).max(axis=1).mean()
    assert selection_gain(4) == pytest.approx(best, abs=0.01) and selection_gain(1) == pytest.approx(0, abs=1e-6)
