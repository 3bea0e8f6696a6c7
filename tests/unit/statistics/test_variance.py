"""Tests of the sources of variance and of the gain of pairing, with values computed by hand and planted variances."""

from math import inf, isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wmtp.statistics.variance import Component, pairing_gain, variance_components

VALUES = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=3, max_size=8)


def test_the_components_equal_values_computed_by_hand() -> None:
    found = variance_components({"initialization": [1.0, 3.0], "order": [2.0, 4.0, 6.0, 8.0], "data": [5.0, 5.0]})
    assert found["initialization"] == Component(2.0, pytest.approx(2.0 / (2.0 + 20 / 3)))
    assert found["order"].variance == pytest.approx(20 / 3)
    assert found["data"] == Component(0.0, 0.0)
    assert sum(each.share for each in found.values()) == pytest.approx(1.0)


def test_planted_variances_are_found_and_runs_in_which_all_varied_would_not_tell_them() -> None:
    generator = np.random.default_rng(1)
    deviations = {"initialization": 3.0, "order": 2.0, "data": 1.0}
    found = variance_components({name: generator.normal(0, each, 5_000).tolist() for name, each in deviations.items()})
    assert [each.share for each in found.values()] == pytest.approx([9 / 14, 4 / 14, 1 / 14], abs=0.02)
    mixed = sum(generator.normal(0, each, (3, 5_000)) for each in deviations.values())
    alike = variance_components({name: row.tolist() for name, row in zip(deviations, mixed, strict=True)})
    assert [each.share for each in alike.values()] == pytest.approx([1 / 3] * 3, abs=0.02), "the control"


def test_sources_without_variance_have_no_share_and_one_value_is_refused() -> None:
    assert isnan(variance_components({"order": [1.0, 1.0]})["order"].share)
    assert variance_components({}) == {}
    with pytest.raises(ValueError, match="order: has 1 value"):
        variance_components({"order": [1.0]})


@settings(deadline=None, max_examples=40)
@given(VALUES, st.data())
def test_the_gain_is_the_ratio_of_the_variances_of_differences(baseline: list[float], data: st.DataObject) -> None:
    arm = data.draw(
        st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=len(baseline), max_size=len(baseline))
    )
    found, total = pairing_gain(baseline, arm), np.var(baseline, ddof=1) + np.var(arm, ddof=1)
    if total == 0:
        assert isnan(found.variance_ratio) and isnan(found.seeds_saved)
        return
    ratio = np.var(np.subtract(arm, baseline), ddof=1) / total
    assert found.variance_ratio == pytest.approx(ratio, abs=1e-9)
    if np.ptp(baseline) > 0.1 and np.ptp(arm) > 0.1:
        assert found.correlation == pytest.approx(stats.pearsonr(baseline, arm).statistic, abs=1e-6)
    if ratio > 1e-6:
        assert found.seeds_saved == pytest.approx(1 / ratio, rel=1e-6)


def test_an_unpaired_comparison_needs_as_many_times_more_seeds() -> None:
    """With a correlation of 0.8, five times as many seeds give the same variance of the mean difference."""
    generator = np.random.default_rng(2)
    common, own = generator.standard_normal(50_000), generator.standard_normal((2, 50_000))
    baseline, arm = np.sqrt(0.8) * common + np.sqrt(0.2) * own
    assert pairing_gain(baseline.tolist(), arm.tolist()).seeds_saved == pytest.approx(5, rel=0.03)
    assert pairing_gain(own[0].tolist(), own[1].tolist()).seeds_saved == pytest.approx(1, rel=0.03), "the control"


def test_equal_differences_save_all_and_unequal_numbers_are_refused() -> None:
    assert pairing_gain([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]).seeds_saved == inf
    for arm in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="values for the same seeds"):
            pairing_gain([1.0, 2.0] if len(arm) > 1 else [1.0], arm)
