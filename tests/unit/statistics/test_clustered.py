"""Tests of clustered intervals of pass rates against a bootstrap, and with simulated studies."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from wmtp.statistics.clustered import clustered_estimate, clustered_standard_error
from wmtp.statistics.paired import estimate_mean_difference

Floats = NDArray[np.float64]
STUDIES = 400


def draw(generator: np.random.Generator, num_seeds: int, num_problems: int, spread: float = 0.3) -> Floats:
    """Return differences between passed problems, as float[seed, problem]. Seeds and problems change the odds."""
    difficulty, gain = generator.normal(0, 1.5, num_problems), generator.normal(0.3, spread, num_problems)
    passed = []
    for effect in (0.0, gain):
        odds = difficulty + effect + generator.normal(0, 0.3, (num_seeds, 1))
        passed.append(generator.random((num_seeds, num_problems)) < 1 / (1 + np.exp(-odds)))
    return passed[1].astype(np.float64) - passed[0]


TRUTH = float(draw(np.random.default_rng(0), 1_500, 3_000).mean())


@pytest.mark.parametrize("num_problems", [50, 200])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_the_interval_covers_the_mean_over_seeds_and_problems_unlike_one_that_only_resamples_problems(
    num_seeds: int, num_problems: int
) -> None:
    generator = np.random.default_rng(num_seeds)
    covered, naive = [], []
    for _ in range(STUDIES):
        study = draw(generator, num_seeds, num_problems)
        found = clustered_estimate(study)
        covered.append(found.low is not None and found.high is not None and found.low <= TRUTH <= found.high)
        error = stats.sem(study.mean(axis=0))
        naive.append(abs(study.mean() - TRUTH) <= 1.96 * error)
    assert np.mean(covered) >= 0.93
    assert np.mean(naive) < 0.89, "the control"


def test_the_standard_error_is_that_of_a_bootstrap_of_both_without_its_bias() -> None:
    """For effects of seeds and problems without noise, the bootstrap has no bias but that of n − 1."""
    generator = np.random.default_rng(1)
    seeds, problems = generator.standard_normal((6, 1)), generator.standard_normal((1, 40))
    additive = seeds + problems
    resampled = [
        additive[generator.integers(6, size=6)][:, generator.integers(40, size=40)].mean() for _ in range(20_000)
    ]
    unbiased = seeds.var() / 5 + problems.var() / 39
    assert clustered_standard_error(additive) == pytest.approx(np.sqrt(unbiased))
    assert np.std(resampled) == pytest.approx(np.sqrt(seeds.var() / 6 + problems.var() / 40), rel=0.03)


def test_noise_is_counted_once_unlike_in_the_bootstrap() -> None:
    generator = np.random.default_rng(2)
    noise = generator.standard_normal((2_000, 5, 50))
    errors = np.array([clustered_standard_error(study) for study in noise])
    means = noise.mean(axis=(1, 2))
    assert 1.0 <= np.sqrt(np.mean(errors**2)) / means.std() < 1.25, "above 1 because variances are not below 0"
    resampled = [
        noise[0][generator.integers(5, size=5)][:, generator.integers(50, size=50)].mean() for _ in range(4_000)
    ]
    assert np.std(resampled) > 1.3 * means.std(), "the control"


def test_with_equal_problems_the_interval_is_the_paired_t_interval_over_seeds() -> None:
    by_seed = np.array([0.1, 0.3, 0.2, 0.25])
    expected, found = estimate_mean_difference(by_seed.tolist()), clustered_estimate(np.tile(by_seed[:, None], 30))
    for name in ("mean", "low", "high", "p"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))
    assert clustered_estimate(by_seed[:, None]).p == pytest.approx(expected.p)


def test_the_interval_is_not_narrower_than_that_over_seeds() -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        study = draw(generator, 4, 30)
        assert clustered_standard_error(study) >= stats.sem(study.mean(axis=1)) * (1 - 1e-9)


def test_one_seed_and_equal_differences_have_no_interval() -> None:
    assert np.isnan(clustered_standard_error(np.ones((1, 20))))
    for differences in (np.ones((1, 20)), np.full((5, 20), 0.1 + 0.2), np.zeros((3, 4))):
        found = clustered_estimate(differences)
        assert (found.low, found.high, found.p) == (None, None, None)
        assert found.mean == pytest.approx(differences.mean())


def test_the_p_value_is_below_the_level_exactly_if_the_interval_excludes_0() -> None:
    generator = np.random.default_rng(4)
    found = [clustered_estimate(draw(generator, 5, 200) + 0.03) for _ in range(200)]
    significant = [each.p is not None and each.p < 0.05 for each in found]
    assert significant == [each.low is not None and each.high is not None and (each.low > 0 or each.high < 0)
                           for each in found]  # fmt: skip
    assert 0.1 < np.mean(significant) < 0.9
