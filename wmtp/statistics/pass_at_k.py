"""The metric pass@k, which is the probability that at least one of k samples passes, and its unbiased estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 9_999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of pass@k over problems, with the bounds of its 95 % interval.

    `low` and `high` are None if pass@k is the same for all problems.
    """

    value: float
    low: float | None
    high: float | None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that at least one of k samples passes.

    The k samples are drawn without replacement from n samples, of which c pass. The probability is
    1 − C(n−c, k) / C(n, k), where C(a, b) is the number of ways to choose b of a samples. Source: Chen et al. 2021,
    Evaluating Large Language Models Trained on Code (arXiv 2107.03374), equation 1.

    >>> pass_at_k(10, 3, 1), round(pass_at_k(10, 3, 5), 6)
    (0.3, 0.916667)

    Raises:
        ValueError: k is greater than n, so that there is no unbiased estimate; or k is below 1; or c is not in the
            range from 0 to n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples of which {c} pass")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def estimate(counts: Sequence[tuple[int, int]], k: int, seed: int = 0) -> Estimate:
    """Return the mean of pass@k over problems, with a bootstrap percentile interval.

    `counts` contains a pair (n, c) for each problem: n samples were graded, and c of them passed. The bootstrap
    resamples problems, not samples. Therefore the interval describes how the mean varies between sets of problems.

    Raises:
        ValueError: a problem has fewer than k samples.
    """
    from scipy.stats import bootstrap  # every training run would wait a second for it, also without samples

    values = np.asarray([pass_at_k(n, c, k) for n, c in counts])
    if len(set(values.tolist())) < 2:  # an interval of width 0 would look like certainty
        return Estimate(float(values.mean()), None, None)
    interval = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))
