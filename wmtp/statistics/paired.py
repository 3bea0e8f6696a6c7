"""Confidence intervals and tests of paired differences, and the correction for several comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from scipy import special, stats

LEVEL = 0.05
POWER = 0.8
MIN_PAIRS = 2
"""Minimum number of pairs for an interval, because a single difference has no standard deviation."""
MIN_PAIRS_FOR_MEDIAN = 5
"""Minimum number of values for an interval of the median.

Even the range from the minimum to the maximum of four values contains the true median in only 7 of 8 cases.
"""
RESAMPLES = 20_000
RESAMPLES_OF_SIGNS = 10_000
"""Maximum number of sign patterns of the sign-flip test."""
MAX_EXACT_VALUES = 6
"""Maximum number of values for which the interval of a median uses all possible resamples instead of random ones."""


@dataclass(frozen=True)
class Estimate:
    """A mean difference with its 95 % interval and p-value."""

    mean: float
    low: float | None
    """Lower end of the interval.

    `low`, `high` and `p` are None if there are fewer than `MIN_PAIRS` differences or if all differences are equal.
    """
    high: float | None
    p: float | None


def estimate_mean_difference(differences: Sequence[float]) -> Estimate:
    """Return the mean of paired differences, with the interval and the p-value of the paired t test.

    If there are fewer than `MIN_PAIRS` differences, or if all of them are equal, there is no interval and no p-value.
    The p-value is below 0.05 exactly if the interval excludes 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    # for equal differences, scipy returns p = 0 or nan, depending on rounding errors
    if len(values) < MIN_PAIRS or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return Estimate(mean, None, None, None)
    test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(1 - LEVEL)
    return Estimate(mean, float(low), float(high), float(test.pvalue))


def wilcoxon_p(differences: Sequence[float]) -> float | None:
    """Return the p-value of Wilcoxon's two-sided signed-rank test of paired differences.

    The result is None if there is only one difference or if all differences are 0.
    """
    return float(stats.wilcoxon(differences).pvalue) if len(differences) > 1 and np.any(differences) else None


def permutation_p(differences: Sequence[float]) -> float | None:
    """Return the p-value of the two-sided sign-flip test of the mean of paired differences.

    The test needs no normal differences: under the null hypothesis, each difference is as likely as its negative. All
    2ⁿ sign patterns are used if there are at most `RESAMPLES_OF_SIGNS` of them, and that many random ones otherwise. As
    in Wilcoxon's test, the p-value of n pairs is at least 2^(1 − n), so that five pairs cannot reach 0.05.

    The result is None if there is only one difference or if all differences are 0.

    Source: Fisher 1935, The Design of Experiments, section 21.

    >>> permutation_p([1.0, 2.0, 3.0, 4.0])
    0.125
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < MIN_PAIRS or not np.any(values):
        return None
    generator = np.random.default_rng(0)
    test = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES_OF_SIGNS, rng=generator
    )
    return float(test.pvalue)


def smallest_wilcoxon_p(num_pairs: int) -> float:
    """Return the smallest p-value that Wilcoxon's two-sided signed-rank test can give for a number of pairs.

    The test gives this p-value if all differences have the same sign.

    >>> smallest_wilcoxon_p(5)
    0.0625
    """
    return float(min(1.0, 2.0 ** (1 - num_pairs)))


def mcnemar_p(won: int, lost: int) -> float:
    """Return the p-value of McNemar's exact two-sided test.

    The test compares the number of test problems that a group won with the number that it lost against the baseline.
    Ties are ignored. The p-value is that of a binomial test.

    >>> mcnemar_p(5, 0)
    0.0625
    """
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p-values after Holm's correction for the number of comparisons.

    If corrected p-values are compared with a level, then the probability of any false positive is at most this level.
    A comparison without a test has the value None before and after the correction, and counts as a comparison.

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((p, number) for number, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, number) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(values) - rank)))
        corrected[number] = largest
    return corrected


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of a median, or None if there are fewer than five values.

    Values may be infinite. All possible resamples are used if there are at most `MAX_EXACT_VALUES` values. Otherwise,
    20,000 random resamples are used. The interval of five values extends from their minimum to their maximum. This
    range contains the true median in 15 of 16 cases.
    """
    num = len(values)
    if num < MIN_PAIRS_FOR_MEDIAN:
        return None
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if num <= MAX_EXACT_VALUES:
        chosen = np.array(list(combinations_with_replacement(range(num), num)))
        counts = np.stack([np.bincount(each, minlength=num) for each in chosen])
        weights = np.exp(special.gammaln(num + 1) - special.gammaln(counts + 1).sum(axis=1))
    else:
        chosen = np.random.default_rng(seed).integers(num, size=(RESAMPLES, num))
        weights = np.ones(RESAMPLES)
    medians = np.median(ordered[chosen], axis=1)
    order = np.argsort(medians)
    shares = np.cumsum(weights[order]) / weights.sum()
    low, high = np.searchsorted(shares, [LEVEL / 2, 1 - LEVEL / 2])
    return float(medians[order[low]]), float(medians[order[high]])
