"""Tests of intervals and p-values against scipy, values computed by hand, and simulated studies."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from wmtp.statistics.paired import (
    MIN_PAIRS,
    estimate_mean_difference,
    holm,
    mcnemar_p,
    median_interval,
    permutation_p,
    smallest_wilcoxon_p,
    wilcoxon_p,
)

STUDIES, SEEDS = 1_000, 5
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]
NOISES: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy tails": lambda generator, shape: generator.standard_t(3, shape),
    "skewed": lambda generator, shape: generator.exponential(size=shape) - 1,
    "flat": lambda generator, shape: generator.uniform(-1, 1, shape),
}
SAMPLE = ["normal", *(pytest.param(name, marks=pytest.mark.deep) for name in NOISES if name != "normal")]
LISTS = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=3, max_size=9)


def intervals(studies: Floats) -> tuple[Floats, Floats]:
    """Return the p-value of each study, as float[study], and the ends of its interval, as float[end, study].

    They are computed by scipy for all studies at once. The estimates of some studies are compared with them.
    """
    test = stats.ttest_1samp(studies, 0, axis=1)
    low, high = test.confidence_interval(0.95)
    for number in range(0, len(studies), max(1, len(studies) // 25)):
        found = estimate_mean_difference(studies[number].tolist())
        assert (found.p, found.low, found.high) == pytest.approx((test.pvalue[number], low[number], high[number]))
    return test.pvalue, np.array([low, high])


def percentile(studies: Floats) -> tuple[Floats, Floats]:
    """Return the intervals of the percentile bootstrap over all 5⁵ resamples, as a control."""
    chosen = np.array(list(product(range(SEEDS), repeat=SEEDS)))
    means = np.stack([study[chosen].mean(axis=1) for study in studies])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return low, high


def differences(draw: Draw, num_groups: int, seed: int) -> Floats:
    """Return null studies float[study × group, seed]; the groups of a study share one baseline."""
    generator = np.random.default_rng(seed)
    group, baseline = draw(generator, (STUDIES, num_groups, SEEDS)), draw(generator, (STUDIES, 1, SEEDS))
    return (group - baseline).reshape(-1, SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("noise", SAMPLE)
def test_false_positive_rate_with_five_seeds_is_at_most_eight_percent(noise: str, num_groups: int) -> None:
    found = intervals(differences(NOISES[noise], num_groups, seed=1))[0].reshape(STUDIES, -1)
    corrected = [holm(list(study)) for study in found]
    assert np.mean([min(p for p in study if p is not None) < 0.05 for study in corrected]) <= 0.08


@pytest.mark.slow
def test_control_without_correction_three_comparisons_exceed_eight_percent() -> None:
    uncorrected = intervals(differences(NOISES["normal"], 3, seed=1))[0].reshape(STUDIES, 3)
    assert np.mean(uncorrected.min(axis=1) < 0.05) > 0.08


@pytest.mark.parametrize("noise", SAMPLE)
def test_the_interval_of_five_seeds_covers_the_true_difference_but_the_percentile_interval_does_not(
    noise: str,
) -> None:
    planted = differences(NOISES[noise], 1, seed=2) + 0.7
    for (low, high), is_covering in ((intervals(planted)[1], True), (percentile(planted), False)):
        assert (np.mean((low <= 0.7) & (high >= 0.7)) >= 0.92) == is_covering


@pytest.mark.slow
@pytest.mark.parametrize("num_pairs", [2, 3, 8, 12])
def test_the_level_holds_for_other_numbers_of_seeds(num_pairs: int) -> None:
    null = NOISES["normal"](np.random.default_rng(5), (STUDIES, num_pairs))
    assert 0.03 <= np.mean(intervals(null)[0] < 0.05) <= 0.07
    assert np.mean(np.abs(null.mean(axis=1)) > 1.96 * null.std(axis=1, ddof=1) / num_pairs**0.5) > 0.07, "the control"


def test_five_seeds_show_a_clear_difference_unlike_the_signed_rank_test() -> None:
    clear = NOISES["normal"](np.random.default_rng(4), (200, SEEDS)) + 2
    assert np.mean(intervals(clear)[0] < 0.05) > 0.85
    assert min(wilcoxon_p(list(study)) or 1.0 for study in clear) == smallest_wilcoxon_p(SEEDS) > 0.05


def test_p_is_below_the_level_exactly_if_the_interval_excludes_zero() -> None:
    p, (low, high) = intervals(NOISES["normal"](np.random.default_rng(6), (300, SEEDS)) + 1.0)
    assert ((p < 0.05) == ((low > 0) | (high < 0))).all()
    assert 0.1 < np.mean(p < 0.05) < 0.9


def test_the_interval_equals_that_of_r() -> None:
    """The expected values are from R: `t.test(extra ~ group, data = sleep, paired = TRUE)`."""
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = estimate_mean_difference(sleep)
    assert (found.mean, found.low, found.high) == pytest.approx((1.58, 0.7001142, 2.4598858))
    assert found.p == pytest.approx(0.00283289)


@settings(deadline=None, max_examples=30)
@given(LISTS, st.sampled_from([-3.0, -1.0, 0.01, 1000.0]))
def test_an_estimate_scales_with_the_unit_and_the_sign(values: list[float], by: float) -> None:
    one, other = estimate_mean_difference(values), estimate_mean_difference([by * value for value in values])
    assert other.mean == pytest.approx(by * one.mean)
    if one.p is None or one.low is None or one.high is None:
        return
    assert other.p == pytest.approx(one.p, abs=1e-3)
    ends = sorted([by * one.low, by * one.high])
    assert [other.low, other.high] == pytest.approx(ends, rel=1e-6, abs=1e-6 * max(map(abs, ends)))


def test_too_few_or_equal_pairs_have_no_interval() -> None:
    for values in ([0.3], [0.2] * 5, [0.1 + 0.2, 0.3, 0.3], [0.0] * 4):
        found = estimate_mean_difference(values)
        assert (found.low, found.high, found.p) == (None, None, None)
        assert found.mean == pytest.approx(sum(values) / len(values))
    assert estimate_mean_difference([0.1, 0.2, 0.3][:MIN_PAIRS]).p is not None


@settings(deadline=None, max_examples=30)
@given(LISTS)
def test_the_signed_rank_p_equals_that_of_scipy(values: list[float]) -> None:
    if not any(values):
        assert wilcoxon_p(values) is None
        return
    group = np.arange(len(values)) + np.asarray(values)
    pairs = group - np.arange(len(values))
    if len(set(np.abs(pairs))) == len(pairs):  # scipy also breaks ties by rounding errors
        assert wilcoxon_p(list(pairs)) == stats.wilcoxon(group, np.arange(len(values))).pvalue


@pytest.mark.parametrize("num_pairs", range(2, 9))
def test_the_smallest_signed_rank_p_equals_that_of_scipy_for_differences_of_one_sign(num_pairs: int) -> None:
    assert stats.wilcoxon(np.arange(1, num_pairs + 1)).pvalue == smallest_wilcoxon_p(num_pairs)


def sign_flip_p(values: list[float]) -> float:
    """Return the p-value over all sign patterns, as an oracle."""
    sums = np.array(list(product([-1, 1], repeat=len(values)))) @ np.abs(values)
    return float(np.mean(np.abs(sums) >= abs(sum(values)) * (1 - 1e-9) - 1e-12))


@settings(deadline=None, max_examples=30)
@given(LISTS)
def test_the_sign_flip_p_counts_all_sign_patterns(values: list[float]) -> None:
    if not any(values):
        assert permutation_p(values) is None
        return
    assert permutation_p(values) == pytest.approx(min(1.0, sign_flip_p(values)), abs=1e-9)


def test_the_sign_flip_p_of_differences_of_one_sign_is_the_smallest_and_of_many_pairs_is_sampled() -> None:
    assert [permutation_p([1.0, 2.0, 3.5, 4.0, 5.0][:num]) for num in (2, 3, 5)] == [0.5, 0.25, 0.0625]
    assert permutation_p([0.3]) is None
    many = np.random.default_rng(3).standard_normal(30) + 0.4
    assert permutation_p(many.tolist()) == permutation_p(many.tolist())
    assert permutation_p(many.tolist()) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_the_sign_flip_test_has_its_level_for_heavy_tails() -> None:
    null = NOISES["heavy tails"](np.random.default_rng(8), (200, 8))
    assert np.mean([(permutation_p(study) or 1) < 0.05 for study in null.tolist()]) <= 0.05 + 3 * np.sqrt(0.05 / 200)


@pytest.mark.parametrize(("won", "lost", "p"), [(5, 0, 2 / 32), (3, 1, 10 / 16), (9, 1, 22 / 1024), (4, 4, 1.0)])
def test_mcnemars_test_is_a_binomial_test_of_discordant_problems(won: int, lost: int, p: float) -> None:
    assert mcnemar_p(won, lost) == pytest.approx(p)
    assert mcnemar_p(lost, won) == pytest.approx(p)
    assert mcnemar_p(0, 0) == 1.0


def test_holm_equals_values_computed_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_without_a_test_counts_for_the_correction() -> None:
    assert holm([0.02, None]) == [0.04, None]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_between_no_correction_and_bonferroni(values: list[float]) -> None:
    for p, corrected in zip(values, holm(list(values)), strict=True):
        assert corrected is not None
        assert p <= corrected <= min(1.0, p * len(values)) + 1e-12


def test_the_median_interval_of_five_values_is_their_range() -> None:
    assert median_interval([3.0, 1.0, math.inf, 2.0, 5.0]) == (1.0, math.inf)
    assert median_interval([1.0, 2.0, 3.0, 4.0]) is None


def test_the_median_interval_of_six_values_uses_all_resamples() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    medians = np.median(values[np.array(list(product(range(6), repeat=6)))], axis=1)
    expected = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
    assert median_interval(list(values)) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("num_pairs", [5, 6, 9])
def test_the_median_interval_covers_the_median(num_pairs: int) -> None:
    draws = np.random.default_rng(10).standard_normal((60, num_pairs))
    intervals = [median_interval(list(draw)) or (math.inf, math.inf) for draw in draws]
    assert np.mean([low <= 0 <= high for low, high in intervals]) >= 0.9
