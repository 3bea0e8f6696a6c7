"""Intervals of the mean difference of pass rates on the same problems, clustered over seeds and problems.

A difference of one seed in one problem is the sum of a mean, an effect of the seed, an effect of the problem, and
noise. The seeds are a sample of possible trainings and the problems are a sample of possible problems, so that the
interval of the mean must cover both choices. An interval that only resamples problems is about these trained models.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from wmtp.statistics.paired import LEVEL, MIN_PAIRS, Estimate


def clustered_standard_error(differences: NDArray[np.float64]) -> float:
    """Return the standard error of the mean difference over seeds and problems.

    It is the closed form of a bootstrap that resamples both seeds and problems (Owen 2007, The Pigeonhole Bootstrap,
    section 4), with two corrections: variances are divided by n − 1, because a bootstrap of three seeds gives only two
    thirds of their variance, and the noise is counted once, because a bootstrap counts it three times. The result is
    neither below the standard error of the means of the seeds nor below that of the noise, which would be possible by
    chance.

    Args:
        differences: float[seed, problem], difference between the pass rates of the arm and of the baseline.

    Returns:
        The standard error. It is nan for fewer than two seeds, and 0 if all differences are equal.

    Source: Miller 2024, Adding Error Bars to Evals (arXiv 2411.00640), sections 2.2 and 4, for clustered errors.
    """
    values = np.asarray(differences, dtype=np.float64)
    num_seeds, num_problems = values.shape
    if num_seeds < MIN_PAIRS:
        return float("nan")
    by_seed, by_problem = values.mean(axis=1), values.mean(axis=0)
    # this variance contains that of the noise
    variance = float(by_seed.var(ddof=1)) / num_seeds
    if num_problems > 1:
        noise = values - by_seed[:, None] - by_problem + values.mean()
        freedom = (num_seeds - 1) * (num_problems - 1)
        noise_variance = float((noise**2).sum()) / freedom / (num_seeds * num_problems)
        variance = max(variance, noise_variance) + max(
            0.0, float(by_problem.var(ddof=1)) / num_problems - noise_variance
        )
    # the means of equal differences can differ by rounding errors
    return sqrt(variance) if variance > (1e-12 * np.abs(values).max()) ** 2 else 0.0


def clustered_estimate(differences: NDArray[np.float64]) -> Estimate:
    """Return the mean difference over seeds and problems, with its 95 % interval and p-value.

    The quantile is that of the t distribution with the number of seeds minus 1 degrees of freedom. The interval is
    wider than necessary if the choice of the problems matters more than the seeds.

    Args:
        differences: float[seed, problem], difference between the pass rates of the arm and of the baseline.

    Returns:
        The estimate. It has no interval and no p-value if there are fewer than two seeds or all differences are equal.
    """
    mean, error = float(np.mean(differences)), clustered_standard_error(differences)
    if not error > 0:
        return Estimate(mean, None, None, None)
    freedom = len(differences) - 1
    width = float(stats.t.isf(LEVEL / 2, freedom)) * error
    return Estimate(mean, mean - width, mean + width, float(2 * stats.t.sf(abs(mean) / error, freedom)))
