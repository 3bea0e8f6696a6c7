"""Print the table of docs/sweeps.md: coverage and power of two intervals of a mean difference, from simulated studies.

The t interval is the one that `wmtp.statistics.paired` computes. The other one is the symmetric bootstrap-t interval.
"""

from collections.abc import Callable
from functools import cache
from math import ceil, sqrt

import numpy as np
from estimate_scaling import table
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
STUDIES, RESAMPLES, LEVEL = 4_000, 2_000, 0.05
PAIRS, EFFECTS = (3, 5, 8, 10), (1, 2)
DIFFERENCES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Floats]] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy-tailed (t₃)": lambda generator, shape: generator.standard_t(3, shape) / sqrt(3),
    "skewed (exponential)": lambda generator, shape: generator.exponential(size=shape) - 1,
}
"""Distributions with mean 0 and standard deviation 1. A study has float[study, pair] differences."""


def bootstrap_widths(standardized: Floats, generator: np.random.Generator) -> Floats:
    """Return the half width of the symmetric bootstrap-t interval of each study, in standard errors of the mean.

    Resampling makes the variance too small by a factor of 1 − 1/n. Normal noise restores half of this loss, with each
    value used once with each sign. Without noise, three pairs would have no finite interval.

    Args:
        standardized: float[study, pair], differences with mean 0 and standard deviation 1 in each study.
        generator: generator of the resamples and of the noise, which are the same for all studies.

    Source: Hall 1988, On Symmetric Bootstrap Confidence Intervals. The noise is from Hesterberg 2015, What Teachers
    Should Know About the Bootstrap (arXiv 1411.5279).
    """
    num = standardized.shape[1]
    chosen = generator.integers(num, size=(RESAMPLES // 2, num))
    noise = generator.standard_normal(chosen.shape) * sqrt(0.5 / num)
    is_chosen = (chosen[:, :, None] == np.arange(num)).astype(np.float64)
    counts, noise_sums = is_chosen.sum(axis=1), np.einsum("rij,ri->rj", is_chosen, noise)
    sums, squares, mixed = standardized @ counts.T, standardized**2 @ counts.T, standardized @ noise_sums.T
    statistics = []
    for sign in (1, -1):
        means = (sums + sign * noise.sum(axis=1)) / num
        variances = (squares + 2 * sign * mixed + (noise**2).sum(axis=1)) / num - means**2
        statistics.append(np.abs(means) / np.sqrt(variances / (num - 1)))
    found = np.concatenate(statistics, axis=1)
    rank = ceil((1 - LEVEL) * (1 + RESAMPLES)) - 1
    return np.partition(found, rank, axis=1)[:, rank]


def simulate(name: str, num_pairs: int) -> list[float]:
    """Return the coverage and the power at each effect, each for the t interval and then for the bootstrap-t interval.

    The power is the share of the intervals that exclude 0 if the true mean is `effect` standard deviations.
    """
    generator = np.random.default_rng(num_pairs)
    studies = DIFFERENCES[name](generator, (STUDIES, num_pairs))
    means, deviations = studies.mean(axis=1), studies.std(axis=1, ddof=1)
    low, high = stats.ttest_1samp(studies, 0, axis=1).confidence_interval(1 - LEVEL)
    standardized = (studies - means[:, None]) / deviations[:, None]
    widths = (high - low) / 2, bootstrap_widths(standardized, generator) * deviations / sqrt(num_pairs)
    coverage = [np.mean(np.abs(means) <= width) for width in widths]
    power = [np.mean(np.abs(means + effect) > width) for effect in EFFECTS for width in widths]
    return [float(share) for share in coverage + power]


@cache
def tables() -> tuple[str]:
    """Return the table of docs/sweeps.md."""
    head = ["differences", "pairs", "coverage: t", "bootstrap-t"]
    for effect in EFFECTS:
        head += [f"power at {effect} SD: t", "bootstrap-t"]
    rows = [
        [name, num_pairs, *(f"{share:.2f}" for share in simulate(name, num_pairs))]
        for name in DIFFERENCES
        for num_pairs in PAIRS
    ]
    return (table(head, rows),)


if __name__ == "__main__":
    print(*tables())
