"""Factor of tokens: how many tokens an arm needs for the end loss of the baseline, relative to the baseline's tokens.

The factor is read from end losses of runs that were trained to several horizons, each with its own decay of the
learning rate, because losses in the middle of a run depend on the schedule. 0.7 means that the arm needs 30 % fewer
tokens.

The losses of a group follow L(D) = E + A · D^(−α) over the tokens D (Hoffmann et al. 2022, Training Compute-Optimal
Large Language Models, arXiv 2203.15556, section 3.3). Two horizons do not tell the asymptote E, and it is 0 for them.
The interval of the factor takes all values of E into account that the losses allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from wmtp.statistics.paired import LEVEL, MIN_PAIRS
from wmtp.statistics.sequential import t_quantile

Floats = NDArray[np.float64]
MAX_OUTSIDE = 4.0
"""Maximum factor between the tokens that an arm needs and its nearest horizon."""
MAX_ASYMPTOTE = 0.9
"""Maximum asymptote of a curve, relative to the smallest loss."""
NUM_TRIED = 33
"""Number of asymptotes that are tried in each step of a fit. Each step tries them closer to the best one."""
ASYMPTOTES = np.linspace(0, MAX_ASYMPTOTE, 10)
"""Asymptotes that the interval considers, relative to the smallest loss."""
ASYMPTOTE_LEVEL = 0.01
"""Level of the test that excludes an asymptote."""


@dataclass(frozen=True)
class HorizonPoint:
    """The end of a run."""

    tokens: float
    """Number of training tokens, above 0."""
    loss: float
    """Loss of the model at the end, above 0."""


@dataclass(frozen=True)
class PowerLaw:
    """A curve of losses over tokens, with which it can be called: asymptote + scale · tokens^(−exponent)."""

    asymptote: float
    scale: float
    exponent: float
    """Exponent of the curve. It is not above 0 if the losses do not fall."""

    def __call__(self, tokens: float) -> float:
        """Return the loss after a number of tokens."""
        return float(self.asymptote + self.scale * tokens**-self.exponent)

    def tokens_for(self, loss: float) -> float | None:
        """Return the number of tokens at which the curve has a loss. None if it never has it or does not fall."""
        if self.exponent <= 0 or loss <= self.asymptote:
            return None
        log_tokens = log(self.scale / (loss - self.asymptote)) / self.exponent
        return exp(log_tokens) if abs(log_tokens) < 500 else None


@dataclass(frozen=True)
class TokenRatio:
    """The factor of tokens of one seed, with the ends of the runs that it was read from."""

    ratio: float | None
    """Tokens that the arm needs, divided by those of the baseline.

    None if the arm's losses do not fall, or if the tokens are more than `MAX_OUTSIDE` times outside its horizons.
    """
    is_extrapolated: bool
    """Whether the tokens that the arm needs are outside its horizons."""
    baseline: tuple[HorizonPoint, ...]
    arm: tuple[HorizonPoint, ...]


@dataclass(frozen=True)
class TokenFactor:
    """The factor of tokens of an arm over several seeds."""

    factor: float | None
    """Factor between the mean curves (geometric means over seeds). None if the arm never has the baseline's loss."""
    low: float | None
    """Lower end of the 95 % interval.

    Both ends are None if there is one seed or if the slope of the curve is not known. One end is None if it is more
    than `MAX_OUTSIDE` times outside the arm's horizons: the interval then has no limit on this side.
    """
    high: float | None
    num_seeds: int
    """Number of seeds. All of them contribute to the factor and to its interval."""
    num_extrapolated: int
    """Number of seeds for which the tokens that the arm needs are outside its horizons."""
    num_without: int
    """Number of seeds that have no factor of their own. They are not left out, which would favor some outcomes."""
    is_mean_extrapolated: bool = False
    """Whether the tokens of `factor` are outside the horizons of the mean curve."""

    @property
    def is_extrapolated(self) -> bool:
        """True if the factor, or that of a seed, depends on values outside of the horizons."""
        return self.is_mean_extrapolated or self.num_extrapolated > 0


def fitted_curve(points: Sequence[HorizonPoint]) -> PowerLaw:
    """Return the power law through the ends of runs at two or more horizons.

    For two horizons, the asymptote is 0, and the curve goes through both points. For more, the asymptote is between 0
    and `MAX_ASYMPTOTE` of the smallest loss, such that the squared errors of the logarithms of the losses are smallest.

    Raises:
        ValueError: there are fewer than two different numbers of tokens, or a value is not above 0 and finite.
    """
    tokens, losses = np.array([each.tokens for each in points]), np.array([each.loss for each in points])
    if len(set(tokens)) < 2 or not all(isfinite(value) and value > 0 for value in (*tokens, *losses)):
        raise ValueError(f"{list(points)}: need at least two different numbers of tokens, and finite values above 0")

    if len(set(tokens)) == 2:
        return best_curve(tokens, losses, np.zeros(1))
    limit = MAX_ASYMPTOTE * float(losses.min())
    tried, best = np.linspace(0, limit, NUM_TRIED), PowerLaw(0, 0, 0)
    while tried[1] - tried[0] > 1e-9 * limit:
        best = best_curve(tokens, losses, tried)
        step = tried[1] - tried[0]
        tried = np.linspace(max(0, best.asymptote - step), min(limit, best.asymptote + step), NUM_TRIED)
    return best


def best_curve(tokens: Floats, losses: Floats, asymptotes: Floats) -> PowerLaw:
    """Return the curve with the smallest squared errors of the logarithms of the losses.

    For each asymptote, the scale and the exponent are those of a line in the logarithms above the asymptote.

    Args:
        tokens: float[run]
        losses: float[run], above all asymptotes.
        asymptotes: float[curve], those that are tried.
    """
    distances = np.log(tokens) - np.log(tokens).mean()
    logs = np.log(losses - asymptotes[:, None])
    slopes, levels = logs @ distances / (distances @ distances), logs.mean(axis=1)
    fitted = asymptotes[:, None] + np.exp(levels[:, None] + slopes[:, None] * distances)
    best = int(((np.log(fitted) - np.log(losses)) ** 2).sum(axis=1).argmin())
    shift = float(levels[best] - slopes[best] * np.log(tokens).mean())
    return PowerLaw(float(asymptotes[best]), exp(shift), -float(slopes[best]))


def token_ratio(baseline: Sequence[HorizonPoint], arm: Sequence[HorizonPoint]) -> TokenRatio:
    """Return the factor of tokens of one seed.

    It is the number of tokens with which the arm's fitted curve has the end loss of the baseline at its longest
    horizon, divided by the baseline's tokens there.

    Args:
        baseline: ends of the baseline's runs, at one or more horizons.
        arm: ends of the arm's runs, at two or more horizons.

    Raises:
        ValueError: the baseline has no run, the arm has fewer than two different numbers of tokens, or a value is not
            above 0 and finite.
    """
    if not baseline or not all(isfinite(each.loss) and each.loss > 0 and each.tokens > 0 for each in baseline):
        raise ValueError(f"{list(baseline)}: need at least one horizon, and finite values above 0")
    last = max(baseline, key=lambda point: point.tokens)
    needed = fitted_curve(arm).tokens_for(last.loss)
    ends = min(each.tokens for each in arm), max(each.tokens for each in arm)
    is_known = needed is not None and ends[0] / MAX_OUTSIDE <= needed <= ends[1] * MAX_OUTSIDE
    ratio = needed / last.tokens if needed is not None and is_known else None
    # a fit through two points can miss the end of the range by a rounding error
    is_outside = needed is not None and not ends[0] * (1 - 1e-9) <= needed <= ends[1] * (1 + 1e-9)
    return TokenRatio(ratio, ratio is not None and is_outside, tuple(baseline), tuple(arm))


def mean_token_factor(ratios: Sequence[TokenRatio]) -> TokenFactor:
    """Return the factor of tokens over several seeds with its 95 % interval.

    The factor is read from the mean curves of the seeds. Factors of single seeds are not averaged, because the slope of
    a single seed can be close to 0 or have the wrong sign.

    The interval contains each factor with which the arm's line, in the logarithms of tokens and of losses above an
    asymptote, meets the baseline's end loss, by a t test over seeds (Fieller 1954, Some Problems in Interval
    Estimation). It is united over all asymptotes that a t test of the curvature does not exclude. Two horizons exclude
    none. It covers the true factor if its factor is not more than `MAX_OUTSIDE` times outside the horizons, and if the
    losses follow a power law.

    Args:
        ratios: result of `token_ratio` for each seed, with the same horizons.

    Raises:
        ValueError: the seeds have different numbers of horizons.
    """
    counts = {len(each.arm) for each in ratios}
    if len(counts) > 1:
        raise ValueError(f"the seeds have different numbers of horizons: {sorted(counts)}")
    known = [each for each in ratios if each.ratio is not None]
    numbers = len(ratios), sum(each.is_extrapolated for each in known), len(ratios) - len(known)
    if not ratios:
        return TokenFactor(None, None, None, *numbers)
    arms = [sorted(each.arm, key=lambda point: point.tokens) for each in ratios]
    ends = [max(each.baseline, key=lambda point: point.tokens) for each in ratios]
    mean_arm = [mean_point(points) for points in zip(*arms, strict=True)]
    mean_ratio = token_ratio([mean_point(ends)], mean_arm)
    if len(ratios) < MIN_PAIRS:
        return TokenFactor(mean_ratio.ratio, None, None, *numbers, mean_ratio.is_extrapolated)
    losses = Losses(
        np.log([[point.tokens for point in points] for points in arms]).mean(axis=0),
        np.array([[point.loss for point in points] for points in arms]),
        np.array([end.loss for end in ends]),
    )
    tokens = mean_point(ends).tokens
    low, high = losses.interval(fitted_curve(mean_arm).asymptote)
    if mean_ratio.ratio is not None:
        low, high = min(low, log(mean_ratio.ratio * tokens)), max(high, log(mean_ratio.ratio * tokens))
    is_low_known = low >= losses.log_tokens[0] - log(MAX_OUTSIDE)
    is_high_known = high <= losses.log_tokens[-1] + log(MAX_OUTSIDE)
    return TokenFactor(
        mean_ratio.ratio,
        exp(low) / tokens if is_low_known and isfinite(low) else None,
        exp(high) / tokens if is_high_known and isfinite(high) else None,
        *numbers,
        mean_ratio.is_extrapolated,
    )


def mean_point(points: Sequence[HorizonPoint]) -> HorizonPoint:
    """Return the geometric mean of the tokens and of the losses."""
    return HorizonPoint(
        exp(float(np.mean(np.log([each.tokens for each in points])))),
        exp(float(np.mean(np.log([each.loss for each in points])))),
    )


@dataclass(frozen=True)
class Losses:
    """The end losses of an arm and of the baseline, by seed."""

    log_tokens: Floats
    """float[horizon], logarithm of the arm's tokens, ascending."""
    arm: Floats
    """float[seed, horizon]"""
    baseline: Floats
    """float[seed], loss of the baseline at its longest horizon."""

    def interval(self, fitted_asymptote: float) -> tuple[float, float]:
        """Return the ends of the interval of the logarithm of the tokens that the arm needs, which may be infinite.

        Args:
            fitted_asymptote: asymptote of the fitted curve, which is never excluded.
        """
        smallest = min(float(self.arm.min()), float(self.baseline.min()))
        tried = [share * smallest for share in ASYMPTOTES]
        kept = [asymptote for asymptote in tried if self._curvature_p(asymptote) >= ASYMPTOTE_LEVEL]
        if fitted_asymptote < smallest:
            kept.append(fitted_asymptote)
        found = [self._fieller(asymptote) for asymptote in kept]
        return min((low for low, _ in found), default=-inf), max((high for _, high in found), default=inf)

    def _fit(self, asymptote: float, degree: int) -> Floats:
        """Return the polynomials of the logarithms of losses over those of tokens, as float[coefficient, seed]."""
        powers = np.vander(self.log_tokens - self.log_tokens.mean(), degree + 1)
        found: Floats = np.linalg.pinv(powers) @ np.log(self.arm - asymptote).T
        return found

    def _curvature_p(self, asymptote: float) -> float:
        """Return the p-value of the curvature that remains if an asymptote is subtracted. 1 for two horizons.

        It is 0 if the seeds do not differ, so that only the fitted asymptote is kept.
        """
        if len(self.log_tokens) < 3:
            return 1.0
        quadratic = self._fit(asymptote, 2)[0]
        error = float(quadratic.std(ddof=1)) / sqrt(len(quadratic))
        return float(2 * stats.t.sf(abs(quadratic.mean()) / error, len(quadratic) - 1)) if error > 0 else 0.0

    def _fieller(self, asymptote: float) -> tuple[float, float]:
        """Return the interval of the logarithm of the tokens for one asymptote, by Fieller's method.

        For each seed, distance + slope · u is the distance between the arm's line at u + the mean logarithm of tokens
        and the baseline's end loss. The interval contains each u at which the mean distance does not differ from 0.
        """
        center = float(self.log_tokens.mean())
        slopes, levels = self._fit(asymptote, 1)
        distances = levels - np.log(self.baseline - asymptote)
        num = len(distances)
        factor = t_quantile(LEVEL / 2, num) ** 2 / num
        slope, distance = float(slopes.mean()), float(distances.mean())
        squared = slope**2 - factor * float(slopes.var(ddof=1))
        if slope >= 0 or squared <= 0:  # the slope may be 0, so that any number of tokens is possible
            return -inf, inf
        covariance = float(((slopes - slope) * (distances - distance)).sum()) / (num - 1)
        linear = slope * distance - factor * covariance
        constant = distance**2 - factor * float(distances.var(ddof=1))
        root = sqrt(max(0.0, linear**2 - squared * constant))
        return center + (-linear - root) / squared, center + (-linear + root) / squared
