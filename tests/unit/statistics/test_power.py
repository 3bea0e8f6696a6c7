"""Tests of the power of t tests and of planned studies against published tables, numerical integrals and simulation."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wmtp.statistics.paired import MIN_PAIRS
from wmtp.statistics.power import (
    SEEDS_CAP,
    hedges_factor,
    planned_equivalence_power,
    planned_power,
    planned_study,
    power,
    seeds_needed,
    seeds_needed_for_equivalence,
)
from wmtp.statistics.sequential import one_sided_boundaries, two_sided_boundaries

SIZES = (3, 4, 5, 6, 7, 8)


def integrated_power(effect: float, num_pairs: int, num_comparisons: int) -> float:
    """Return the power of the t test, integrated over the distribution of the sample's standard deviation."""
    bound = stats.t.isf(0.05 / num_comparisons / 2, num_pairs - 1)
    deviations = np.sqrt(stats.chi2.ppf((np.arange(5_000) + 0.5) / 5_000, num_pairs - 1) / (num_pairs - 1))
    shift = abs(effect) * np.sqrt(num_pairs)
    return float((stats.norm.sf(bound * deviations - shift) + stats.norm.cdf(-bound * deviations - shift)).mean())


@pytest.mark.parametrize("num_comparisons", [1, 7, 12, 100])
@pytest.mark.parametrize("num_pairs", [2, 3, 5, 20, 1000])
def test_the_power_is_the_integral_over_the_standard_deviation(num_pairs: int, num_comparisons: int) -> None:
    for effect in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0, 20.0, 30.0, 100.0):
        expected = integrated_power(effect, num_pairs, num_comparisons)
        assert power(effect, num_pairs, num_comparisons) == pytest.approx(expected, abs=2e-3)
        assert power(-effect, num_pairs, num_comparisons) == power(effect, num_pairs, num_comparisons)


def test_without_effect_the_power_is_the_level() -> None:
    assert [power(0.0, num, 5) for num in (2, 5, 50)] == pytest.approx([0.01] * 3)
    with pytest.raises(ValueError, match="num_pairs=1"):
        power(1.0, 1)


@pytest.mark.parametrize(("effect", "needed"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_equal_tables_of_the_paired_t_test(effect: float, needed: int) -> None:
    """The expected values are from Cohen's tables and R's power.t.test(type = "paired")."""
    assert seeds_needed(effect, 1.0) == needed
    assert seeds_needed(-2 * effect, 2.0) == needed


@settings(deadline=None, max_examples=80)
@given(st.floats(0.1, 20), st.integers(1, 100))
def test_the_power_of_the_seeds_needed_is_between_70_and_90_percent_where_whole_numbers_allow_it(
    effect: float, num_comparisons: int
) -> None:
    needed = seeds_needed(effect, 1.0, num_comparisons)
    assert needed is not None
    if needed > SEEDS_CAP:
        assert power(effect, SEEDS_CAP, num_comparisons) < 0.8
        return
    found = power(effect, needed, num_comparisons)
    assert found >= 0.7
    if found > 0.9 and needed > MIN_PAIRS:
        assert power(effect, needed - 1, num_comparisons) < 0.7, "one pair less would be too few"
    if found < 0.8:
        assert power(effect, needed + 1, num_comparisons) > 0.9, "one pair more would be too many"
    else:
        assert needed == MIN_PAIRS or power(effect, needed - 1, num_comparisons) < 0.8


@pytest.mark.parametrize(("effect", "num_comparisons"), [(0.5, 1), (1.0, 7), (2.0, 12), (3.0, 7), (3.0, 12)])
def test_simulated_studies_find_the_effect_with_the_power_of_the_seeds_needed(
    effect: float, num_comparisons: int
) -> None:
    """The control is an effect in deviations of a run instead of a difference, for which the number is too small."""
    needed = seeds_needed(effect, 1.0, num_comparisons) or 0
    values = np.random.default_rng(1).standard_normal((2, 4_000, needed))
    level, expected = 0.05 / num_comparisons, power(effect, needed, num_comparisons)
    found = np.mean(stats.ttest_1samp(values[0] + effect, 0, axis=1).pvalue < level)
    assert 0.7 <= expected <= 0.9
    assert found == pytest.approx(expected, abs=0.025)
    assert np.mean(stats.ttest_1samp(values[0] - values[1] + effect, 0, axis=1).pvalue < level) < 0.6


def test_seven_comparisons_need_more_seeds_than_one() -> None:
    assert (seeds_needed(3.0, 1.0, 7), seeds_needed(3.0, 1.0)) == (5, 3)
    assert power(3.0, 5, 7) == pytest.approx(0.835, abs=0.005)
    assert power(3.0 / sqrt(2), 5, 7) == pytest.approx(0.51, abs=0.01), "an effect in deviations of a run"


@pytest.mark.parametrize(("mean", "delta", "num_comparisons"), [(0.0, 1.5, 14), (0.5, 1.5, 14), (0.0, 0.5, 1)])
def test_simulated_studies_find_arms_the_same_with_the_power_of_the_seeds_needed(
    mean: float, delta: float, num_comparisons: int
) -> None:
    needed = seeds_needed_for_equivalence(mean, 1.0, delta, num_comparisons) or 0
    powers = []
    for num in (needed, needed - 1):
        studies = np.random.default_rng(0).normal(mean, 1, (40_000, num))
        margins = delta - np.abs(studies.mean(axis=1))
        bound = stats.t.isf(0.05 / num_comparisons, num - 1)
        powers.append(np.mean(margins > bound * studies.std(axis=1, ddof=1) / np.sqrt(num)))
    assert powers[1] < 0.8 + 0.01 and 0.8 - 0.01 < powers[0] < 0.84
    assert seeds_needed_for_equivalence(delta, 1.0, delta) is None


def test_seeds_needed_have_a_maximum_and_a_minimum() -> None:
    assert seeds_needed(0.01, 1.0) == SEEDS_CAP + 1
    assert seeds_needed(1e6, 1.0) == MIN_PAIRS
    assert (seeds_needed(0.0, 1.0), seeds_needed(1.0, 0.0)) == (None, None)


@pytest.mark.parametrize("num_pairs", [3, 5, 10])
def test_hedges_factor_removes_the_bias_of_a_measured_effect(num_pairs: int) -> None:
    studies = np.random.default_rng(2).standard_normal((200_000, num_pairs)) + 1.0
    measured = studies.mean(axis=1) / studies.std(axis=1, ddof=1)
    assert np.mean(measured) * hedges_factor(num_pairs) == pytest.approx(1.0, abs=0.03)
    assert np.mean(measured) > 1.05, "the control"
    assert hedges_factor(2) == hedges_factor(3) / 2


def test_numbers_from_measured_effects_have_the_power_only_if_they_are_corrected() -> None:
    """The mean power over pilots of three pairs, for a true effect of 2 and seven comparisons."""
    pilots = np.random.default_rng(3).standard_normal((300, 3)) + 2.0
    corrected, naive = (
        np.mean([power(2.0, seeds_needed(each.mean(), each.std(ddof=1), 7, num) or 0, 7) for each in pilots])
        for num in (3, None)
    )
    assert naive < 0.7 <= corrected <= 0.9


@pytest.mark.parametrize(("effect", "num_comparisons"), [(1.2, 1), (2.0, 7)])
def test_the_planned_power_is_the_share_of_simulated_studies(effect: float, num_comparisons: int) -> None:
    differences = np.random.default_rng(4).standard_normal((10_000, SIZES[-1])) + effect
    bounds = two_sided_boundaries(SIZES, 0.05 / num_comparisons)
    statistics = [stats.ttest_1samp(differences[:, :size], 0, axis=1).statistic for size in SIZES]
    crossed = np.stack(statistics, axis=1) > bounds
    planned = planned_study(effect, SIZES, num_comparisons)
    first = np.where(crossed.any(axis=1), crossed.argmax(axis=1), len(SIZES) - 1)
    assert planned.power == pytest.approx(crossed.any(axis=1).mean(), abs=0.015)
    assert planned.num_pairs == pytest.approx(np.array(SIZES)[first].mean(), abs=0.05)
    assert (
        planned.power == planned_power(effect, SIZES, num_comparisons) == planned_power(-effect, SIZES, num_comparisons)
    )
    assert planned.power < power(effect, SIZES[-1], num_comparisons), "looks cost some power"


def test_the_planned_power_of_a_single_look_is_that_of_the_t_test() -> None:
    assert planned_power(1.5, (6,), 3) == pytest.approx(power(1.5, 6, 3), abs=0.006)


def test_the_planned_equivalence_power_is_the_share_of_simulated_studies() -> None:
    differences = np.random.default_rng(5).standard_normal((10_000, SIZES[-1]))
    sames, differs = one_sided_boundaries(SIZES, 0.05 / 7), two_sided_boundaries(SIZES, 0.05 / 7)
    same, different = np.zeros(10_000, bool), np.zeros(10_000, bool)
    for size, same_bound, bound in zip(SIZES, sames, differs, strict=True):
        mean, error = differences[:, :size].mean(axis=1), stats.sem(differences[:, :size], axis=1)
        different |= ~same & (np.abs(mean) > bound * error)
        same |= ~different & (1.5 - np.abs(mean) > same_bound * error)
    assert planned_equivalence_power(1.5, SIZES, 7) == pytest.approx(same.mean(), abs=0.015)
    assert 0.1 < same.mean() < 0.9
    assert planned_equivalence_power(0.01, SIZES, 7) < 0.001
