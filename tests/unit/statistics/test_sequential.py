"""Tests of the boundaries for repeated looks against scipy, and with simulated studies."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wmtp.statistics.sequential import (
    TRAJECTORIES,
    nominal_levels,
    one_sided_boundaries,
    simulate_trajectories,
    smallest_tails,
    two_sided_boundaries,
)

SIZES = (3, 4, 5, 6, 7, 8)
STUDIES = 100_000
LEVELS = [0.05 / number for number in range(1, 13)]


def crossing_shares(level: float) -> tuple[float, float, float, float]:
    """Return the shares of studies without difference that cross: with both boundaries, and with t quantiles."""
    generator = np.random.default_rng(7)
    differences = generator.standard_normal((STUDIES, SIZES[-1]))
    statistics = np.stack([stats.ttest_1samp(differences[:, :size], 0, axis=1).statistic for size in SIZES], axis=1)
    freedom = np.array(SIZES) - 1
    crossed = (
        np.abs(statistics) > two_sided_boundaries(SIZES, level),
        statistics > one_sided_boundaries(SIZES, level),
        np.abs(statistics) > stats.t.isf(level / 2, freedom),
        statistics > stats.t.isf(level, freedom),
    )
    two_sided, one_sided, naive_two, naive_one = (float(each.any(axis=1).mean()) for each in crossed)
    return two_sided, one_sided, naive_two, naive_one


@pytest.mark.parametrize("level", [0.05, 0.05 / 7])
def test_the_error_over_all_looks_is_the_level_unlike_that_of_repeated_t_tests(level: float) -> None:
    error = 3 * np.sqrt(level / STUDIES) + 3 * level / np.sqrt(level * TRAJECTORIES)
    two_sided, one_sided, naive_two, naive_one = crossing_shares(level)
    assert two_sided == pytest.approx(level, abs=error)
    assert one_sided == pytest.approx(level, abs=error)
    assert min(naive_two, naive_one) > 2 * level, "the control"


@pytest.mark.parametrize("size", [2, 3, 5, 30])
@pytest.mark.parametrize("level", [0.05, 0.05 / 12, 1e-6])
def test_the_boundary_of_a_single_look_is_the_t_quantile(size: int, level: float) -> None:
    assert two_sided_boundaries((size,), level) == (stats.t.isf(level / 2, size - 1),)
    assert one_sided_boundaries((size,), level) == (stats.t.isf(level, size - 1),)


@pytest.mark.parametrize("is_two_sided", [True, False])
def test_no_boundary_increases_with_the_level_and_all_are_at_least_as_strict_as_one_look(is_two_sided: bool) -> None:
    levels = np.concatenate([np.geomspace(1e-7, 0.5, 200), LEVELS])
    nominal = np.array([nominal_levels(SIZES, float(level), is_two_sided=is_two_sided) for level in np.sort(levels)])
    assert (np.diff(nominal, axis=0) > 0).all()
    assert (np.diff(nominal, axis=1) > 0).all(), "later looks have larger levels"
    assert (nominal <= np.sort(levels)[:, None]).all()
    assert (nominal.sum(axis=1) >= np.sort(levels) * (1 - 1e-9)).all(), "at least the union bound"


def test_the_first_look_at_two_pairs_takes_almost_nothing_from_the_last_one() -> None:
    with_first, without = (two_sided_boundaries(sizes, 0.05)[-1] for sizes in ((2, 3, 5), (3, 5)))
    assert with_first == pytest.approx(without, rel=0.02)
    assert two_sided_boundaries((2, 3, 5), 0.05)[0] > 100


def test_boundaries_of_twelve_levels_take_seconds() -> None:
    sizes = tuple(range(3, 11))
    start = time.process_time()
    for level in LEVELS:
        two_sided_boundaries(sizes, level)
        one_sided_boundaries(sizes, level)
    assert time.process_time() - start < 6
    assert smallest_tails.cache_info().currsize > 0


def test_the_boundaries_are_the_same_each_time() -> None:
    before = two_sided_boundaries((3, 5), 0.05)
    smallest_tails.cache_clear()
    nominal_levels.cache_clear()
    assert two_sided_boundaries((3, 5), 0.05) == before


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=4, unique=True).map(sorted))
def test_the_summaries_of_simulated_studies_have_the_distribution_of_normal_differences(sizes: list[int]) -> None:
    (chunk,) = simulate_trajectories(tuple(sizes), 4_000, seed=3)
    for look, size in enumerate(sizes):
        assert stats.kstest(chunk.means[:, look] * np.sqrt(size), "norm").pvalue > 1e-4
        squares = chunk.standard_errors[:, look] ** 2 * size * (size - 1)
        assert stats.kstest(squares, "chi2", args=(size - 1,)).pvalue > 1e-4
    for earlier, later in pairwise(range(len(sizes))):
        found = np.corrcoef(chunk.means[:, earlier], chunk.means[:, later])[0, 1]
        assert found == pytest.approx(np.sqrt(sizes[earlier] / sizes[later]), abs=0.08)


@pytest.mark.parametrize(("sizes", "level"), [((), 0.05), ((1, 3), 0.05), ((3, 3), 0.05), ((3,), 0.0), ((3,), 0.6)])
def test_invalid_plans_are_refused(sizes: tuple[int, ...], level: float) -> None:
    with pytest.raises(ValueError, match=r"sizes=|level="):
        two_sided_boundaries(sizes, level)
