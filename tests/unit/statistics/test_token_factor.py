"""Tests of factors of tokens with planted laws of the loss."""

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wmtp.statistics.token_factor import HorizonPoint, TokenRatio, fitted_curve, mean_token_factor, token_ratio

LAWS = ((1.7, 1.5, 0.3), (0.0, 3.0, 0.1), (1.7, 0.5, 0.3), (1.0, 2.0, 0.5), (2.0, 0.4, 0.2), (0.5, 1.5, 0.2))
"""E, A and α of losses E + A · D^(−α), with D = 1 at the longest horizon."""
SCALE = 1e9


def loss(law: tuple[float, float, float], tokens: float) -> float:
    """Return the loss of a law after a number of tokens, relative to the longest horizon."""
    return law[0] + law[1] * tokens ** -law[2]


def points(law: tuple[float, float, float], horizons: tuple[float, ...], speed: float = 1.0) -> list[HorizonPoint]:
    """Return the ends of runs without noise. An arm with speed 2 learns as much from half of the tokens."""
    return [HorizonPoint(SCALE * tokens, loss(law, speed * tokens)) for tokens in horizons]


def simulate(
    generator: np.random.Generator, law: tuple[float, float, float], factor: float, shape: tuple[int, int], noise: float
) -> list[TokenRatio]:
    """Return the ratios of seeds. 70 % of the variance of the noise is common to the arm and the baseline."""
    horizons = tuple(0.5 ** np.arange(shape[1])[::-1])
    common = generator.standard_normal(shape) * np.sqrt(0.7)
    groups = []
    for speed in (1.0, 1 / factor):
        factors = np.exp(noise * (common + generator.standard_normal(shape) * np.sqrt(0.3)))
        exact = points(law, horizons, speed)
        groups.append([[HorizonPoint(each.tokens, each.loss * float(f)) for each, f in zip(exact, row, strict=True)]
                       for row in factors])  # fmt: skip
    return [token_ratio(*pair) for pair in zip(*groups, strict=True)]


@settings(deadline=None, max_examples=50)
@given(st.floats(0.5, 2), st.floats(0.05, 0.6), st.floats(0.5, 1.5), st.sampled_from([2, 3, 4]))
def test_a_planted_factor_is_found_exactly_without_asymptote(
    scale: float, exponent: float, factor: float, num_horizons: int
) -> None:
    law, horizons = (0.0, scale, exponent), tuple(0.5**each for each in range(num_horizons))
    found = token_ratio(points(law, horizons), points(law, horizons, 1 / factor))
    assert found.ratio == pytest.approx(factor, rel=1e-3)
    if min(abs(factor - 1), abs(factor - horizons[-1])) > 1e-6:
        assert found.is_extrapolated == (not horizons[-1] <= factor <= 1)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("law", LAWS)
def test_three_horizons_find_the_asymptote_unlike_two(law: tuple[float, float, float], factor: float) -> None:
    three = token_ratio(points(law, (0.25, 0.5, 1)), points(law, (0.25, 0.5, 1), 1 / factor))
    assert three.ratio == pytest.approx(factor, rel=1e-3)
    two = token_ratio(points(law, (0.5, 1)), points(law, (0.5, 1), 1 / factor))
    assert two.ratio == pytest.approx(factor, rel=0.08)
    if factor == 1.5 and law[0] > 0:
        assert two.ratio is not None and two.ratio < 1.499, "the control"


def test_a_fitted_curve_has_the_parameters_of_its_law() -> None:
    curve = fitted_curve([HorizonPoint(tokens, 1.7 + 40 * tokens**-0.2) for tokens in (1e6, 1e7, 1e8, 1e9)])
    assert (curve.asymptote, curve.scale, curve.exponent) == pytest.approx((1.7, 40, 0.2), rel=1e-3)
    assert curve(1e7) == pytest.approx(1.7 + 40 * 1e7**-0.2)
    assert curve.tokens_for(curve(3e7)) == pytest.approx(3e7)
    assert curve.tokens_for(1.6) is None


@pytest.mark.parametrize(("factor", "num_horizons"), [(factor, num) for factor in (0.5, 1.0, 1.5) for num in (2, 3)])
def test_the_interval_covers_the_planted_factor(factor: float, num_horizons: int) -> None:
    generator = np.random.default_rng(1)
    covered, limited = [], []
    for number in range(108):
        num_seeds, noise = (3, 5, 8)[number % 3], (0.01, 0.02, 0.03)[number // 3 % 3]
        found = mean_token_factor(simulate(generator, LAWS[number % 6], factor, (num_seeds, num_horizons), noise))
        covered.append((found.low or 0.0) <= factor <= (found.high or inf))
        limited.append(found.low is not None and found.high is not None)
    assert np.mean(covered) >= 0.93
    assert np.mean(limited) > 0.5


def test_control_the_interval_of_single_seeds_does_not_cover_an_extrapolated_factor_of_two_horizons() -> None:
    generator = np.random.default_rng(2)
    covered, naive = [], []
    for _ in range(60):
        ratios = simulate(generator, (1.0, 2.0, 0.5), 1.5, (8, 2), 0.002)
        found = mean_token_factor(ratios)
        covered.append((found.low or 0.0) <= 1.5 <= (found.high or inf))
        logs = np.log([each.ratio for each in ratios if each.ratio is not None])
        naive.append(stats.ttest_1samp(logs, np.log(1.5)).pvalue >= 0.05)
    assert np.mean(covered) >= 0.93
    assert np.mean(naive) < 0.2


def test_the_factor_is_that_of_the_mean_curves_and_all_seeds_count() -> None:
    law = (1.0, 2.0, 0.3)
    exact = token_ratio(points(law, (0.25, 0.5, 1)), points(law, (0.25, 0.5, 1), 1 / 0.7))
    found = mean_token_factor([exact] * 4)
    assert (found.factor, found.low, found.high) == pytest.approx((0.7, 0.7, 0.7), rel=0.05)
    assert (found.num_seeds, found.num_extrapolated, found.num_without) == (4, 0, 0)
    rising = TokenRatio(None, False, exact.baseline, tuple(HorizonPoint(each.tokens, 1 + each.tokens / 1e10)
                                                           for each in exact.arm))  # fmt: skip
    mixed = mean_token_factor([exact, exact, exact, rising])
    assert (mixed.num_seeds, mixed.num_without) == (4, 1)
    assert mixed.factor != pytest.approx(found.factor, rel=0.01)


def test_a_factor_of_the_mean_curves_outside_of_the_horizons_is_extrapolated() -> None:
    flat, steep = [HorizonPoint(1, 1.0), HorizonPoint(2, 0.98)], [HorizonPoint(1, 1.0), HorizonPoint(2, 0.90)]
    factor = mean_token_factor([token_ratio([HorizonPoint(2, 0.90)], arm) for arm in (flat, steep)])
    assert factor.factor is not None and factor.factor > 1  # the arms end at the baseline's tokens
    assert factor.num_extrapolated == 0, "of the seeds that have a factor of their own, none is extrapolated"
    assert factor.is_extrapolated


def test_losses_that_do_not_fall_have_no_factor() -> None:
    law = (1.0, 2.0, 0.3)
    baseline = points(law, (0.5, 1))
    flat = token_ratio(baseline, [HorizonPoint(0.5 * SCALE, 2.9), HorizonPoint(SCALE, 3.0)])
    assert (flat.ratio, flat.is_extrapolated) == (None, False)
    found = mean_token_factor([flat] * 3)
    assert (found.factor, found.low, found.high, found.num_without) == (None, None, None, 3)


@pytest.mark.parametrize(("factor", "is_known"), [(0.13, True), (0.12, False), (3.9, True), (4.1, False)])
def test_no_factor_is_given_far_outside_the_horizons(factor: float, is_known: bool) -> None:
    law = (0.0, 2.0, 0.3)
    found = token_ratio(points(law, (0.5, 1)), points(law, (0.5, 1), 1 / factor))
    assert (found.ratio is not None) == found.is_extrapolated == is_known


def test_one_seed_has_no_interval_and_no_seed_has_no_factor() -> None:
    law = (0.0, 2.0, 0.3)
    one = mean_token_factor([token_ratio(points(law, (0.5, 1)), points(law, (0.5, 1), 1 / 0.8))])
    assert one.factor == pytest.approx(0.8)
    assert (one.low, one.high) == (None, None)
    assert mean_token_factor([]).factor is None


def test_noise_that_hides_the_slope_leaves_no_interval() -> None:
    noisy = simulate(np.random.default_rng(3), (2.0, 0.4, 0.2), 1.0, (3, 2), 0.2)
    found = mean_token_factor(noisy)
    assert (found.low, found.high) == (None, None)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_the_factor_does_not_depend_on_the_unit_of_tokens(seed: int, unit: float) -> None:
    ratios = simulate(np.random.default_rng(seed), LAWS[seed % 6], 0.8, (4, 3), 0.01)
    other = [
        token_ratio(
            *([HorizonPoint(unit * each.tokens, each.loss) for each in group] for group in (ratio.baseline, ratio.arm))
        )
        for ratio in ratios
    ]
    one, scaled = mean_token_factor(ratios), mean_token_factor(other)
    for name in ("factor", "low", "high"):
        first, second = getattr(one, name), getattr(scaled, name)
        assert (first is None) == (second is None)
        assert first is None or second == pytest.approx(first, rel=1e-2)


def test_invalid_points_are_refused() -> None:
    good = points((0.0, 2.0, 0.3), (0.5, 1))
    for baseline, arm in (([], good), (good, good[:1]), (good, [good[0], HorizonPoint(SCALE, 0.0)]),
                          ([HorizonPoint(1.0, inf)], good)):  # fmt: skip
        with pytest.raises(ValueError, match="need at least"):
            token_ratio(baseline, arm)
    three = points((0.0, 2.0, 0.3), (0.25, 0.5, 1))
    with pytest.raises(ValueError, match="different numbers of horizons"):
        mean_token_factor([token_ratio(good, good), token_ratio(three, three)])
