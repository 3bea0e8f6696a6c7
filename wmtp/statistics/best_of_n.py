"""The expected best result of a search with n random trials."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wmtp.statistics.paired import LEVEL

RESAMPLES = 2_000


@dataclass(frozen=True)
class BestOfN:
    """The expected best value of n random trials, with its 95 % band."""

    n: int
    expected: float
    low: float
    """Lower end of the band. It is equal to `high` if there is only one trial, which has no band."""
    high: float


def expected_best(values: Sequence[float], *, lower_is_better: bool) -> list[BestOfN]:
    """Return the expected best value of n random trials, for n from 1 to the number of trials.

    The expectation is that of n draws with replacement from the values of the trials. It is optimistic for n close to
    the number of trials (Tang et al. 2020, Showing Your Work Doesn't Always Work, arXiv 2004.13705). The band is the
    percentile interval over resamples of the trials, with a fixed seed. It cannot exceed the range of the values.

    Args:
        values: result of each trial, with settings that were drawn independently. Not nan.
        lower_is_better: whether lower values are better.

    Raises:
        ValueError: there is no value, or a value is not finite.

    Source: Dodge et al. 2019, Show Your Work: Improved Reporting of Experimental Results (arXiv 1909.03004), section 3.

    >>> [point.expected for point in expected_best([1.0, 2.0], lower_is_better=True)]
    [1.5, 1.25]
    """
    trials = np.asarray(values, dtype=np.float64)
    if not len(trials) or not np.isfinite(trials).all():
        raise ValueError(f"values={list(values)}: need at least one value, and only finite values")
    num, sign = len(trials), -1.0 if lower_is_better else 1.0
    ascending = np.sort(sign * trials)
    # probability that the best of n draws is at most the i-th value, as float[n, i]
    below = (np.arange(num + 1) / num) ** np.arange(1, num + 1)[:, None]
    shares = np.diff(below, axis=1)
    expected = sign * shares @ ascending
    chosen = np.random.default_rng(0).integers(num, size=(RESAMPLES, num))
    resampled = sign * np.sort(ascending[chosen], axis=1) @ shares.T
    low, high = np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return [BestOfN(n + 1, float(expected[n]), float(low[n]), float(high[n])) for n in range(num)]
