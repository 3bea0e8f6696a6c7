"""Power of paired t tests, the number of pairs of runs that they need, and the power of planned studies with looks.

Effects are mean differences divided by the standard deviation of the differences.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import special

from wmtp.statistics.paired import LEVEL, MIN_PAIRS, POWER
from wmtp.statistics.sequential import (
    Trajectories,
    check_sizes,
    one_sided_boundaries,
    simulate_trajectories,
    t_quantile,
    two_sided_boundaries,
)

Booleans = NDArray[np.bool_]
SEEDS_CAP = 1_000
LARGE_SHIFT = 30.0
MIN_POWER, MAX_POWER = 0.7, 0.9
"""Range of the power with which a number of pairs is called enough, where whole numbers of pairs allow it."""
STUDIES = 100_000


def power(effect: float, num_pairs: int, num_comparisons: int = 1) -> float:
    """Return the probability that a paired t test of a planned number of pairs finds an effect.

    The test is two-sided. Its level is 5 % divided by the number of comparisons, as in the first step of Holm's
    correction: it is the power of one comparison if no other comparison finds anything. The probability that all
    comparisons find their effects is lower.

    Args:
        effect: true mean of the differences, divided by their standard deviation.
        num_pairs: number of pairs of runs, at least 2.
        num_comparisons: number of groups that are compared with the baseline.

    Raises:
        ValueError: there are fewer than 2 pairs.

    >>> round(power(0.5, 34), 3)
    0.808
    """
    if num_pairs < MIN_PAIRS:
        raise ValueError(f"num_pairs={num_pairs}: must be at least {MIN_PAIRS}")
    shift, bound = abs(effect) * sqrt(num_pairs), t_quantile(LEVEL / num_comparisons / 2, num_pairs)
    if shift > LARGE_SHIFT:
        return _exceedance(shift, bound, num_pairs)
    wrong_sign = float(np.nan_to_num(special.nctdtr(num_pairs - 1, shift, -bound)))
    return min(1.0, _exceedance(shift, bound, num_pairs) + max(0.0, wrong_sign))


def _exceedance(shift: float, bound: float, num_pairs: int) -> float:
    """Return the probability that a t statistic with the noncentrality `shift` is above a bound."""
    freedom = num_pairs - 1
    if shift > LARGE_SHIFT:
        # scipy's noncentral t is inaccurate for large shifts, where only the sample's standard deviation is uncertain
        return float(special.gammainc(freedom / 2, freedom / 2 * (shift / bound) ** 2))
    return 1 - float(special.nctdtr(freedom, shift, bound))


def seeds_needed(
    mean: float, deviation: float, num_comparisons: int = 1, num_pilot_pairs: int | None = None
) -> int | None:
    """Return the number of pairs of runs with which a paired t test finds a mean difference with about 80 % power.

    The level of the test is 5 % divided by the number of comparisons, as in the first step of Holm's correction. The
    number is the smallest one with a power of at least 80 %. If its power is above 90 %, because one more pair can
    change the power from 50 to 95 %, then one pair less is enough if it has at least 70 %. `power` gives the power of
    the number for the effect `mean` / `deviation`.

    The number assumes that the mean and the standard deviation are the true ones. A mean and a standard deviation
    that were measured with few pairs overstate the effect: with numbers from five pairs, a true effect of 3 is then
    found with a power of 0.74 instead of 0.84 on average among seven comparisons, and with numbers from three pairs
    with 0.67. `num_pilot_pairs` corrects the measured effect for this with Hedges' factor, with which the power is
    between 0.7 and 0.93 on average over the measurements. It stays a guess: a single measurement can still be far off.

    Args:
        mean: mean of the differences.
        deviation: standard deviation of the differences (not of the values of one group).
        num_comparisons: number of groups that are compared with the baseline.
        num_pilot_pairs: number of pairs with which `mean` and `deviation` were measured, None if they are true values
            or assumptions. For 2 pairs, which do not tell an effect, the factor of 3 pairs is halved.

    Returns:
        The number of pairs. It is `SEEDS_CAP` + 1 if more than `SEEDS_CAP` pairs are needed, and None if `mean` or
        `deviation` is 0.

    Source: Hedges 1981, Distribution Theory for Glass's Estimator of Effect Size and Related Estimators.

    >>> seeds_needed(0.5, 1.0)
    34
    """
    if mean == 0 or deviation == 0:
        return None
    effect = abs(mean) / deviation * (1.0 if num_pilot_pairs is None else hedges_factor(num_pilot_pairs))

    def power_of(num_pairs: int) -> float:
        """Return the power with a number of pairs."""
        return power(effect, num_pairs, num_comparisons)

    # the power grows with the number of pairs
    needed = bisect_left(range(SEEDS_CAP + 1), POWER, lo=MIN_PAIRS, key=power_of)
    is_too_much = needed > MIN_PAIRS and power_of(min(needed, SEEDS_CAP)) > MAX_POWER
    return needed - 1 if is_too_much and power_of(needed - 1) >= MIN_POWER else needed


def seeds_needed_for_equivalence(mean: float, deviation: float, delta: float, num_comparisons: int = 1) -> int | None:
    """Return the number of pairs of runs that two one-sided t tests need to find a mean difference within ±δ.

    They find it with a power of at least 80 %. The power is computed as if at most one of the tests failed, which makes
    it too small where it is low. The mean and the standard deviation are taken as the true ones.

    Args:
        mean: mean of the differences.
        deviation: standard deviation of the differences.
        delta: δ, above 0.
        num_comparisons: number of groups that are compared with the baseline.

    Returns:
        The number of pairs. It is `SEEDS_CAP` + 1 if more than `SEEDS_CAP` pairs are needed, and None if the mean is
        not within ±δ or `deviation` is 0.

    Source: Schuirmann 1987, A Comparison of the Two One-Sided Tests Procedure and the Power Approach.

    >>> seeds_needed_for_equivalence(0.0, 1.0, 0.5)
    36
    """
    if abs(mean) >= delta or deviation == 0:
        return None

    def power_of(num_pairs: int) -> float:
        """Return the power with a number of pairs."""
        bound, scale = t_quantile(LEVEL / num_comparisons, num_pairs), sqrt(num_pairs) / deviation
        ends = (delta - mean) * scale, (delta + mean) * scale
        return sum(_exceedance(shift, bound, num_pairs) for shift in ends) - 1

    return bisect_left(range(SEEDS_CAP + 1), POWER, lo=MIN_PAIRS, key=power_of)


def hedges_factor(num_pairs: int) -> float:
    """Return the factor that makes a mean divided by a standard deviation of normal values unbiased.

    For 2 values, the expected quotient is infinite, and half of the factor of 3 values is returned.

    Args:
        num_pairs: number of values, at least 2.
    """
    if num_pairs <= MIN_PAIRS:
        return hedges_factor(MIN_PAIRS + 1) / 2
    freedom = num_pairs - 1
    return float(np.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) * np.sqrt(2 / freedom))


@dataclass(frozen=True)
class PlannedStudy:
    """The expected result of a study with planned looks."""

    power: float
    """Probability that the study finds what is true."""
    num_pairs: float
    """Mean number of pairs until the decision, or until the last look."""


def planned_power(effect: float, sizes: tuple[int, ...], num_comparisons: int = 1) -> float:
    """Return the probability that repeated tests find an effect at one of the planned looks, in its true direction.

    The level over all looks is 5 % divided by the number of comparisons, as in the first step of Holm's correction. It
    is computed from `STUDIES` simulated studies, with a standard error of at most 0.0016.

    Args:
        effect: true mean of the differences, divided by their standard deviation. Not 0.
        sizes: number of pairs at each planned look, increasing, at least 2.
        num_comparisons: number of groups that are compared with the baseline.

    Raises:
        ValueError: the sizes do not increase from at least 2.
    """
    return planned_study(effect, sizes, num_comparisons).power


def planned_study(effect: float, sizes: tuple[int, ...], num_comparisons: int = 1) -> PlannedStudy:
    """Return the power of `planned_power` with the mean number of pairs of an arm until it is found.

    Raises:
        ValueError: the sizes do not increase from at least 2.
    """
    check_sizes(sizes)
    bounds = np.array(two_sided_boundaries(sizes, LEVEL / num_comparisons))
    studies = simulated_studies(sizes)
    statistic = (studies.means + abs(effect)) / studies.standard_errors
    return first_crossings(np.abs(statistic) > bounds, statistic > 0, sizes)


def planned_equivalence_power(delta_in_deviations: float, sizes: tuple[int, ...], num_comparisons: int = 1) -> float:
    """Return the probability that an arm without difference is found to be the same within ±δ at a planned look.

    Each of the two one-sided tests has the level 5 % divided by the number of comparisons over all looks. An arm that
    is (wrongly) found better or worse at the same or an earlier look is not found to be the same.

    Args:
        delta_in_deviations: δ, divided by the standard deviation of the differences, above 0.
        sizes: number of pairs at each planned look, increasing, at least 2.
        num_comparisons: number of groups that are compared with the baseline.

    Raises:
        ValueError: the sizes do not increase from at least 2.
    """
    check_sizes(sizes)
    level = LEVEL / num_comparisons
    bounds, same_bounds = np.array(two_sided_boundaries(sizes, level)), np.array(one_sided_boundaries(sizes, level))
    studies = simulated_studies(sizes)
    distance = np.abs(studies.means)
    is_different = distance > bounds * studies.standard_errors
    is_same = delta_in_deviations - distance > same_bounds * studies.standard_errors
    return first_crossings(is_different | is_same, ~is_different, sizes).power


@lru_cache(maxsize=2)
def simulated_studies(sizes: tuple[int, ...]) -> Trajectories:
    """Return `STUDIES` simulated studies without difference, which are others than those of the boundaries."""
    chunks = list(simulate_trajectories(sizes, STUDIES, seed=1))
    return Trajectories(
        np.concatenate([chunk.means for chunk in chunks]), np.concatenate([chunk.standard_errors for chunk in chunks])
    )


def first_crossings(is_crossed: Booleans, is_right: Booleans, sizes: tuple[int, ...]) -> PlannedStudy:
    """Return the share of studies that are decided rightly at their first crossing, and the mean number of pairs.

    Args:
        is_crossed: bool[study, look], whether a boundary is crossed.
        is_right: bool[study, look], whether crossing it is the right decision.
        sizes: number of pairs at each look.
    """
    is_decided = is_crossed.any(axis=1)
    first = np.where(is_decided, is_crossed.argmax(axis=1), len(sizes) - 1)
    right = is_decided & is_right[np.arange(len(first)), first]
    return PlannedStudy(float(right.mean()), float(np.asarray(sizes)[first].mean()))
