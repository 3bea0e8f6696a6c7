"""Boundaries for tests of paired differences that are repeated after every seed, with control of the error.

The data are looked at several times. At look k, the first `sizes[k]` differences give the statistic
T_k = mean_k / standard_error_k. A test that compares each T_k with the quantile for a single look would be wrong too
often: after every seed from 3 to 8, a difference that does not exist is found in about 14 % instead of 5 % of studies.

The nominal level of look k, with which the p-value of T_k is compared, is u · (sizes[k] / sizes[-1])^`EXPONENT`. The
constant u is chosen such that the probability of crossing any boundary is the given level if the differences are normal
and their true mean is 0. This probability does not depend on the unknown standard deviation, so that it is computed
from simulated studies. Early looks have small nominal levels, because few differences show neither their standard
deviation nor their distribution, and because the last look then keeps most of the power.

Source: Jennison and Turnbull 2000, Group Sequential Methods with Applications to Clinical Trials. Sections 2.7
(families of boundaries with one constant) and 4.4 (nominal levels of t statistics), and chapter 9 (repeated intervals).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
EXPONENT = 3.0
TRAJECTORIES = 500_000
CHUNK = 100_000
MAX_LEVEL = 0.5
MIN_TAIL = 400
"""Minimum number of simulated studies beyond a quantile. Below it, the bound by the sum of the levels is used."""


@dataclass(frozen=True)
class Trajectories:
    """Simulated means and standard errors of normal differences with true mean 0 and standard deviation 1."""

    means: Floats
    """float[study, look]"""
    standard_errors: Floats
    """float[study, look]"""


def check_sizes(sizes: tuple[int, ...]) -> None:
    """Check that the planned looks have increasing numbers of pairs, at least 2.

    Raises:
        ValueError: there is no look, the numbers do not increase, or the first one is below 2.
    """
    if not sizes or sizes[0] < 2 or any(later <= earlier for earlier, later in pairwise(sizes)):
        raise ValueError(f"sizes={sizes}: the numbers of pairs at the looks must increase, from at least 2")


def simulate_trajectories(sizes: tuple[int, ...], num_studies: int, seed: int) -> Iterator[Trajectories]:
    """Yield simulated studies in chunks of at most `CHUNK` studies.

    The differences between two looks are summarized by their mean and their sum of squares, which are drawn directly.

    Args:
        sizes: number of pairs at each look, increasing.
        num_studies: number of simulated studies.
        seed: seed of the random generator.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, num_studies, CHUNK):
        num = min(CHUNK, num_studies - start)
        means, errors = np.empty((num, len(sizes))), np.empty((num, len(sizes)))
        mean, squares, before = np.zeros(num), np.zeros(num), 0
        for look, size in enumerate(sizes):
            new = size - before
            shift = generator.standard_normal(num) / np.sqrt(new) - mean
            squares = squares + shift**2 * before * new / size
            if new > 1:
                squares = squares + generator.chisquare(new - 1, num)
            mean = mean + shift * new / size
            means[:, look], errors[:, look] = mean, np.sqrt(squares / (size - 1) / size)
            before = size
        yield Trajectories(means, errors)


def weights(sizes: tuple[int, ...]) -> Floats:
    """Return the nominal level of each look as a multiple of that of the last look, as float[look]."""
    return (np.asarray(sizes, dtype=np.float64) / sizes[-1]) ** EXPONENT


@lru_cache(maxsize=32)
def smallest_tails(sizes: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return, in ascending order, the smallest weighted p-value over the looks of simulated studies without difference.

    The p-value of look k is divided by its weight, so that a study crosses a boundary exactly if its smallest weighted
    p-value is at most u. Only values up to `MAX_LEVEL` are returned.

    Returns:
        The values of the two-sided tests and those of the one-sided tests, as float[value].
    """
    factors = weights(sizes)
    two_sided, one_sided = list[Floats](), list[Floats]()
    for chunk in simulate_trajectories(sizes, TRAJECTORIES, seed=0):
        statistic = chunk.means / chunk.standard_errors
        smallest = np.full((2, len(statistic)), np.inf)
        for look, (size, weight) in enumerate(zip(sizes, factors, strict=True)):
            # the tail is only needed where it can be the smallest value
            is_far = np.abs(statistic[:, look]) >= stats.t.isf(min(0.5, MAX_LEVEL * weight), size - 1)
            tail = special.stdtr(size - 1, -np.abs(statistic[is_far, look])) / weight
            smallest[0, is_far] = np.minimum(smallest[0, is_far], 2 * tail)
            tail[statistic[is_far, look] < 0] = np.inf
            smallest[1, is_far] = np.minimum(smallest[1, is_far], tail)
        two_sided.append(smallest[0][smallest[0] <= MAX_LEVEL])
        one_sided.append(smallest[1][smallest[1] <= MAX_LEVEL])
    return np.sort(np.concatenate(two_sided)), np.sort(np.concatenate(one_sided))


@lru_cache(maxsize=1024)
def nominal_levels(sizes: tuple[int, ...], level: float, *, is_two_sided: bool) -> tuple[float, ...]:
    """Return the level with which the p-value of each look is compared.

    The levels do not decrease if `level` increases. Tests that step down to a larger level therefore keep all that they
    rejected. If too few simulated studies are beyond the quantile, then the levels are scaled to the sum `level`, which
    is valid by the union bound.

    Args:
        sizes: number of pairs at each planned look, increasing.
        level: probability of crossing any boundary if there is no difference, above 0 and at most 0.5.
        is_two_sided: whether the p-values are those of two-sided tests.

    Raises:
        ValueError: the sizes do not increase from at least 2, or the level is not in the range.
    """
    check_sizes(sizes)
    if not 0 < level <= MAX_LEVEL:
        raise ValueError(f"level={level}: must be above 0 and at most {MAX_LEVEL}")
    if len(sizes) == 1:
        return (level,)
    factors = weights(sizes)
    constant = level / float(factors.sum())
    rank = int(level * TRAJECTORIES)
    if rank >= MIN_TAIL:
        constant = max(constant, float(smallest_tails(sizes)[0 if is_two_sided else 1][rank - 1]))
    return tuple(float(constant * factor) for factor in factors)


@lru_cache(maxsize=4096)
def t_quantile(tail: float, num_pairs: int) -> float:
    """Return the value that a t statistic of this number of pairs exceeds with the probability `tail`."""
    return float(stats.t.isf(tail, num_pairs - 1))


def two_sided_boundaries(sizes: tuple[int, ...], level: float) -> tuple[float, ...]:
    """Return the value that |T_k| must exceed at each look.

    A repeated interval is mean_k ± boundary_k · standard_error_k: with probability 1 − `level`, the intervals of all
    looks contain the true mean. For a single look, the boundary is the quantile of the t distribution.

    Source: Jennison and Turnbull 1989, Interim Analyses: The Repeated Confidence Interval Approach.

    Args:
        sizes: number of pairs at each planned look, increasing.
        level: probability of crossing any boundary if there is no difference, above 0 and at most 0.5.

    Raises:
        ValueError: the sizes do not increase from at least 2, or the level is not in the range.

    >>> [round(boundary, 3) for boundary in two_sided_boundaries((5,), 0.05)]
    [2.776]
    """
    levels = nominal_levels(sizes, level, is_two_sided=True)
    return tuple(t_quantile(each / 2, size) for each, size in zip(levels, sizes, strict=True))


def one_sided_boundaries(sizes: tuple[int, ...], level: float) -> tuple[float, ...]:
    """Return the value that T_k must exceed at each look, if only positive differences count.

    Args:
        sizes: number of pairs at each planned look, increasing.
        level: probability of crossing any boundary if there is no difference, above 0 and at most 0.5.

    Raises:
        ValueError: the sizes do not increase from at least 2, or the level is not in the range.

    >>> [round(boundary, 3) for boundary in one_sided_boundaries((5,), 0.05)]
    [2.132]
    """
    levels = nominal_levels(sizes, level, is_two_sided=False)
    return tuple(t_quantile(each, size) for each, size in zip(levels, sizes, strict=True))
