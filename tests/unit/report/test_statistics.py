"""Intervals and tests against scipy, by hand, and by simulated studies; a naive interval fails where ours holds."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wmtp.report.statistics import (
    MIN_PAIRS,
    SEEDS_CAP,
    Floats,
    absolute_t,
    bootstrap_t,
    estimated,
    holm,
    mcnemar_p,
    median_interval,
    seeds_needed,
    smallest_wilcoxon_p,
    wilcoxon_p,
)

STUDIES, SEEDS, RESAMPLES = 1_000, 5, 1_000
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]
NOISES: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy tails": lambda generator, shape: generator.standard_t(3, shape),
    "skewed": lambda generator, shape: generator.exponential(size=shape) - 1,
    "flat": lambda generator, shape: generator.uniform(-1, 1, shape),
}
LISTS = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=3, max_size=9)


def percentile(studies: Floats) -> tuple[Floats, Floats]:
    """The percentile bootstrap over all 5⁵ resamples: the control."""
    chosen = np.array(list(product(range(SEEDS), repeat=SEEDS)))
    means = np.stack([study[chosen].mean(axis=1) for study in studies])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return low, high


def differences(draw: Draw, num_groups: int, seed: int) -> Floats:
    """Null studies: [study × group, seed], each group against a baseline that all groups of a study share."""
    generator = np.random.default_rng(seed)
    group, baseline = draw(generator, (STUDIES, num_groups, SEEDS)), draw(generator, (STUDIES, 1, SEEDS))
    return (group - baseline).reshape(-1, SEEDS)


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_five_seeds_without_a_difference_show_one_in_at_most_eight_studies_of_a_hundred(
    noise: str, num_groups: int
) -> None:
    found = bootstrap_t(differences(NOISES[noise], num_groups, seed=1), resamples=RESAMPLES)[0].reshape(STUDIES, -1)
    corrected = [holm(list(study)) for study in found]
    assert np.mean([min(p for p in study if p is not None) < 0.05 for study in corrected]) <= 0.08


def test_five_percent_for_each_of_three_comparisons_would_be_more_than_eight_for_all() -> None:
    means = differences(NOISES["normal"], 3, seed=1).reshape(STUDIES, 3, SEEDS)
    uncorrected = stats.ttest_1samp(means, 0, axis=2).pvalue
    assert np.mean(uncorrected.min(axis=1) < 0.05) > 0.08


@pytest.mark.parametrize("noise", NOISES)
def test_the_interval_of_five_seeds_covers_a_planted_difference_and_the_percentile_interval_does_not(
    noise: str,
) -> None:
    planted = differences(NOISES[noise], 1, seed=2) + 0.7
    width = bootstrap_t(planted, resamples=RESAMPLES)[1]
    assert np.mean(np.abs(planted.mean(axis=1) - 0.7) <= width) >= 0.92
    low, high = percentile(planted[:300])
    assert np.mean((low <= 0.7) & (high >= 0.7)) < 0.9


def test_differences_that_are_themselves_skewed_are_covered_nearly_as_well() -> None:
    skewed = NOISES["skewed"](np.random.default_rng(3), (STUDIES, SEEDS))
    p, width = bootstrap_t(skewed, resamples=RESAMPLES)
    assert np.mean(np.abs(skewed.mean(axis=1)) <= width) >= 0.9
    assert np.mean(p < 0.05) <= 0.1 < np.mean(stats.ttest_1samp(skewed, 0, axis=1).pvalue < 0.05)


def test_a_clear_difference_is_found_with_five_seeds_which_the_signed_rank_test_cannot() -> None:
    clear = NOISES["normal"](np.random.default_rng(4), (200, SEEDS)) + 2
    assert np.mean(bootstrap_t(clear, resamples=RESAMPLES)[0] < 0.05) > 0.7
    assert min(wilcoxon_p(list(study)) or 1.0 for study in clear) == smallest_wilcoxon_p(SEEDS) > 0.05


@pytest.mark.parametrize("num_pairs", [3, 4, 8, 12])
def test_other_numbers_of_seeds_hold_their_level_too(num_pairs: int) -> None:
    null = NOISES["normal"](np.random.default_rng(5), (600, num_pairs))
    assert np.mean(bootstrap_t(null, resamples=RESAMPLES)[0] < 0.05) <= 0.07


def test_the_p_value_says_whether_the_interval_leaves_out_zero() -> None:
    studies = NOISES["normal"](np.random.default_rng(6), (300, SEEDS)) + 1.2
    p, width = bootstrap_t(studies, resamples=RESAMPLES)
    assert ((p < 0.05) == (np.abs(studies.mean(axis=1)) > width)).all()
    assert 0.1 < np.mean(p < 0.05) < 0.9


def test_many_pairs_give_the_t_interval() -> None:
    values = np.random.default_rng(7).standard_normal(200) + 0.1
    found, expected = estimated(list(values)), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.01)


@settings(deadline=None, max_examples=30)
@given(LISTS, st.sampled_from([-3.0, -1.0, 0.01, 1000.0]))
def test_an_estimate_does_not_depend_on_the_unit_or_on_which_group_comes_first(values: list[float], by: float) -> None:
    one, other = estimated(values), estimated([by * value for value in values])
    assert other.mean == pytest.approx(by * one.mean)
    if one.p is None or one.low is None or one.high is None:
        return
    assert other.p == pytest.approx(one.p, abs=1e-3)
    ends = sorted([by * one.low, by * one.high])
    assert [other.low, other.high] == pytest.approx(ends, rel=1e-6, abs=1e-6 * max(map(abs, ends)))


def test_too_few_pairs_and_pairs_that_are_all_alike_have_no_interval() -> None:
    for values in ([0.3], [0.3, 0.1], [0.2] * 5, [0.1 + 0.2, 0.3, 0.3], [0.0] * 4):
        found = estimated(values)
        assert (found.low, found.high, found.p) == (None, None, None)
        assert found.mean == pytest.approx(sum(values) / len(values))
    assert estimated([0.1, 0.2, 0.3][:MIN_PAIRS]).p is not None


def test_t_is_scipys() -> None:
    values = np.random.default_rng(8).standard_normal((20, 6)) + 0.3
    assert absolute_t(values) == pytest.approx(np.abs(stats.ttest_1samp(values, 0, axis=1).statistic))


@settings(deadline=None, max_examples=30)
@given(LISTS)
def test_the_signed_rank_p_is_scipys(values: list[float]) -> None:
    if not any(values):
        assert wilcoxon_p(values) is None
        return
    group = np.arange(len(values)) + np.asarray(values)
    pairs = group - np.arange(len(values))
    if len(set(np.abs(pairs))) == len(pairs):  # scipy, too, breaks ties as rounding left them
        assert wilcoxon_p(list(pairs)) == stats.wilcoxon(group, np.arange(len(values))).pvalue


@pytest.mark.parametrize("num_pairs", range(2, 9))
def test_the_smallest_signed_rank_p_is_what_scipy_gives_when_all_pairs_agree(num_pairs: int) -> None:
    assert stats.wilcoxon(np.arange(1, num_pairs + 1)).pvalue == smallest_wilcoxon_p(num_pairs)


@pytest.mark.parametrize(("won", "lost", "p"), [(5, 0, 2 / 32), (3, 1, 10 / 16), (9, 1, 22 / 1024), (4, 4, 1.0)])
def test_mcnemars_test_is_the_binomial_of_the_problems_that_one_side_alone_solved(
    won: int, lost: int, p: float
) -> None:
    assert mcnemar_p(won, lost) == pytest.approx(p)
    assert mcnemar_p(lost, won) == pytest.approx(p)
    assert mcnemar_p(0, 0) == 1.0


def test_holm_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_without_a_test_counts_as_one() -> None:
    assert holm([0.02, None]) == [0.04, None]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_lies_between_no_correction_and_bonferronis(values: list[float]) -> None:
    for p, corrected in zip(values, holm(list(values)), strict=True):
        assert corrected is not None
        assert p <= corrected <= min(1.0, p * len(values)) + 1e-12


@pytest.mark.parametrize(("effect", "needed"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_the_paired_t_tests_tables(effect: float, needed: int) -> None:
    """Cohen's tables, and R's power.t.test(type = "paired")."""
    assert seeds_needed(effect, 1.0) == needed
    assert seeds_needed(-2 * effect, 2.0) == needed


def test_that_many_seeds_show_the_difference_in_four_studies_of_five() -> None:
    needed = seeds_needed(1.0, 1.0, num_comparisons=3)
    assert needed is not None and needed > 10
    studies = np.random.default_rng(9).standard_normal((600, needed)) + 1.0
    shown = np.mean(bootstrap_t(studies, resamples=RESAMPLES)[0] < 0.05 / 3)
    assert 0.72 < shown < 0.86


def test_seeds_needed_have_a_cap_and_a_floor() -> None:
    assert seeds_needed(0.01, 1.0) == SEEDS_CAP + 1
    assert seeds_needed(1e6, 1.0) == MIN_PAIRS
    assert (seeds_needed(0.0, 1.0), seeds_needed(1.0, 0.0)) == (None, None)


def test_a_medians_interval_of_five_reaches_from_the_least_to_the_largest() -> None:
    assert median_interval([3.0, 1.0, math.inf, 2.0, 5.0]) == (1.0, math.inf)
    assert median_interval([1.0, 2.0, 3.0, 4.0]) is None


def test_a_medians_interval_counts_every_resample_of_six() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    medians = np.median(values[np.array(list(product(range(6), repeat=6)))], axis=1)
    expected = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
    assert median_interval(list(values)) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("num_pairs", [5, 6, 9])
def test_a_medians_interval_covers_the_median(num_pairs: int) -> None:
    draws = np.random.default_rng(10).standard_normal((60, num_pairs))
    intervals = [median_interval(list(draw)) or (math.inf, math.inf) for draw in draws]
    assert np.mean([low <= 0 <= high for low, high in intervals]) >= 0.9
