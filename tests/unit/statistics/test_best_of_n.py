"""Tests of the expected best of n trials against all possible draws."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.statistics.best_of_n import expected_best

VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25)
@given(VALUES, st.booleans())
def test_the_expectation_is_the_mean_over_all_draws(values: list[float], lower_is_better: bool) -> None:
    best = min if lower_is_better else max
    for point in expected_best(values, lower_is_better=lower_is_better):
        draws = [best(draw) for draw in product(values, repeat=point.n)]
        assert point.expected == pytest.approx(np.mean(draws), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(VALUES)
def test_more_trials_are_not_worse_and_the_sign_is_symmetric(values: list[float]) -> None:
    lower = expected_best(values, lower_is_better=True)
    higher = expected_best([-value for value in values], lower_is_better=False)
    assert [each.n for each in lower] == list(range(1, len(values) + 1))
    assert all(later.expected <= earlier.expected + 1e-9 for earlier, later in pairwise(lower))
    for one, other in zip(lower, higher, strict=True):
        assert (one.expected, one.low, one.high) == pytest.approx((-other.expected, -other.high, -other.low))
        assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9


def test_the_band_of_one_draw_is_that_of_the_mean_and_covers_it_unlike_the_band_of_a_single_trial() -> None:
    generator = np.random.default_rng(1)
    covered, single = [], []
    for _ in range(200):
        trials = generator.standard_normal(20).tolist()
        point = expected_best(trials, lower_is_better=True)[0]
        covered.append(point.low <= 0 <= point.high)
        (alone,) = expected_best(trials[:1], lower_is_better=True)
        single.append(alone.low <= 0 <= alone.high)
    assert np.mean(covered) > 0.87, "the percentile band of 20 trials is somewhat too narrow"
    assert np.mean(single) == 0, "the control"


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_that_are_not_finite_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values="):
        expected_best(values, lower_is_better=True)
