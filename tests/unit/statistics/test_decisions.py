"""Tests of decisions on several arms: against Holm's correction, worked examples, and simulated studies."""

from collections.abc import Iterator
from dataclasses import replace
from math import inf, isnan, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from wmtp.statistics.decisions import ArmDecision, Look, decide, look_at
from wmtp.statistics.paired import estimate_mean_difference, holm
from wmtp.statistics.sequential import one_sided_boundaries, two_sided_boundaries

Floats = NDArray[np.float64]
SIZES = (3, 4, 5, 6, 7, 8)
STUDIES = 1_000
SLACK = 3 * np.sqrt(0.05 * 0.95 / STUDIES)


def moments(differences: Floats) -> tuple[Floats, Floats]:
    """Return the means and the standard errors at each look, as float[study, arm, look]."""
    samples = [differences[..., :size] for size in SIZES]
    errors = [stats.sem(sample, axis=-1) for sample in samples]
    return np.stack([sample.mean(axis=-1) for sample in samples], axis=-1), np.stack(errors, axis=-1)


def decide_all(differences: Floats, delta: float | None = None) -> Iterator[dict[str, ArmDecision]]:
    """Yield the decisions on the arms of each study, with looks after each seed, where lower is better."""
    for means, errors in zip(*(each.tolist() for each in moments(differences)), strict=True):
        arms = [[Look(*look) for look in zip(SIZES, *arm, strict=True)] for arm in zip(means, errors, strict=True)]
        looks = {str(number): arm for number, arm in enumerate(arms)}
        yield decide(looks, SIZES, delta=delta, lower_is_better=True)


def studies(num_arms: int, seed: int) -> Floats:
    """Return float[study, arm, seed], differences from a baseline that all arms share, with standard deviation 1."""
    generator = np.random.default_rng(seed)
    arms, baseline = (generator.standard_normal((STUDIES, num, SIZES[-1])) for num in (num_arms, 1))
    return (arms - baseline) / np.sqrt(2)


@pytest.mark.parametrize("num_arms", [1, 7])
def test_five_percent_of_studies_without_difference_find_one_unlike_with_repeated_t_tests(num_arms: int) -> None:
    null = studies(num_arms, seed=1)
    false = [any(each.decision in ("better", "worse") for each in found.values()) for found in decide_all(null)]
    means, errors = moments(null)
    naive = (np.abs(means) > stats.t.isf(0.025, np.array(SIZES) - 1) * errors).any(axis=(1, 2))
    assert np.mean(false) <= 0.05 + SLACK
    assert np.mean(naive) > 0.05 + 2 * SLACK, "the control"


def test_five_percent_of_studies_at_delta_find_an_arm_the_same_unlike_with_repeated_tests() -> None:
    null = studies(7, seed=2) + 1.5
    false = [any(each.is_within_delta for each in found.values()) for found in decide_all(null, delta=1.5)]
    means, errors = moments(null)
    naive = (1.5 - np.abs(means) > stats.t.isf(0.05, np.array(SIZES) - 1) * errors).any(axis=(1, 2))
    assert np.mean(false) <= 0.05 + SLACK
    assert np.mean(naive) > 0.05 + 2 * SLACK, "the control"


def test_arms_without_difference_do_not_profit_from_arms_with_one() -> None:
    planted = studies(4, seed=3) + np.array([-9.0, -9.0, 0.0, 0.0])[:, None]
    found = [[each.decision for each in study.values()] for study in decide_all(planted)]
    assert all(study[:2] == ["better", "better"] for study in found)
    assert np.mean([study[2:] != ["undecided", "undecided"] for study in found]) <= 0.05 + SLACK


def test_decisions_of_a_single_look_are_those_of_holm() -> None:
    generator = np.random.default_rng(4)
    found_any = 0
    for _ in range(200):
        arms = generator.standard_normal((5, 6)) + generator.choice([0.0, 1.0, 2.0], (5, 1))
        p_values = holm([estimate_mean_difference(arm).p for arm in arms.tolist()])
        looks = {str(number): [look_at(arm)] for number, arm in enumerate(arms.tolist())}
        found = decide(looks, (6,), delta=None, lower_is_better=False)
        assert [each.decision != "undecided" for each in found.values()] == [
            p is not None and p < 0.05 for p in p_values
        ]
        found_any += sum(each.decision == "better" for each in found.values())
    assert found_any > 100


def test_finding_an_arm_makes_it_easier_to_find_the_next_one() -> None:
    size, spread = 6, np.array([-1.0, 1.0] * 3)
    unit = spread.std(ddof=1) / np.sqrt(size)
    halfway = float(np.mean(stats.t.isf([0.05 / 2 / 2, 0.05 / 1 / 2], size - 1))) * unit
    second = look_at((spread + halfway).tolist())
    alone = decide({"a": [look_at(spread.tolist())], "b": [second]}, (size,), delta=None, lower_is_better=False)
    both = decide({"a": [look_at((spread + 9).tolist())], "b": [second]}, (size,), delta=None, lower_is_better=False)
    assert (alone["b"].decision, alone["b"].level) == ("undecided", 0.025)
    assert (both["a"].level, both["b"].decision, both["b"].level) == (0.025, "better", 0.05)


def test_arms_without_a_value_count_as_comparisons() -> None:
    looks = {"a": [Look(8, 1.0, 0.3)]}
    alone, among = (decide(looks, (8,), delta=None, lower_is_better=True, num_comparisons=num) for num in (None, 7))
    assert (alone["a"].decision, among["a"].decision) == ("worse", "undecided")
    assert among["a"].level == pytest.approx(0.05 / 7)


def test_a_decision_is_final_and_later_looks_are_ignored() -> None:
    clear, opposite = Look(4, -2.0, 0.05), Look(5, 2.0, 0.05)
    found = decide({"a": [Look(3, -2.0, 0.8), clear, opposite]}, SIZES, delta=1.0, lower_is_better=True)["a"]
    assert (found.decision, found.look) == ("better", clear)
    assert found.high < 0


def test_the_same_is_final_too_but_a_difference_within_delta_is_a_difference() -> None:
    same = decide({"a": [Look(3, 0.0, 0.01), Look(4, 2.0, 0.01)]}, SIZES, delta=1.0, lower_is_better=True)["a"]
    assert (same.decision, same.is_within_delta, same.look.num_pairs) == ("the same", True, 3)
    small = decide({"a": [Look(3, -0.5, 0.01)]}, SIZES, delta=1.0, lower_is_better=True)["a"]
    assert (small.decision, small.is_within_delta) == ("better", True)
    large = decide({"a": [Look(3, -1.5, 0.01)]}, SIZES, delta=1.0, lower_is_better=True)["a"]
    assert (large.decision, large.is_within_delta) == ("better", False)
    untested = decide({"a": [Look(3, 0.0, 0.01)]}, SIZES, delta=None, lower_is_better=True)["a"]
    assert (untested.decision, untested.is_within_delta) == ("undecided", False)


def test_each_family_has_its_own_step_down() -> None:
    """A different arm is not one that is the same, so that the tests of being the same keep their level."""
    bound = {count: one_sided_boundaries(SIZES, 0.05 / count)[-1] for count in (1, 2)}
    between = 1.0 / (bound[1] + bound[2]) * 2  # within ±1 at the level of one arm only
    waiting = [Look(size, 0.0, inf) for size in SIZES[:-1]]
    close = [*waiting, Look(8, 0.0, between)]
    different = decide({"a": close, "b": [*waiting, Look(8, 9.0, 0.1)]}, SIZES, delta=1.0, lower_is_better=True)
    assert (different["b"].decision, different["a"].decision) == ("worse", "undecided")
    same = decide({"a": close, "b": [*waiting, Look(8, 0.0, 0.01)]}, SIZES, delta=1.0, lower_is_better=True)
    assert (same["b"].decision, same["a"].decision) == ("the same", "the same")
    assert same["a"].level == 0.025, "an arm that is the same still counts for the tests of a difference"


@pytest.mark.parametrize("look", [Look(3, 0.5, 0.0), Look(1, 0.5, nan), Look(0, nan, nan), Look(3, nan, 0.1)])
def test_looks_that_cannot_be_tested_decide_nothing(look: Look) -> None:
    found = decide({"a": [look]}, SIZES, delta=1.0, lower_is_better=True)["a"]
    assert (found.decision, found.is_within_delta, found.level) == ("undecided", False, 0.05)
    assert isnan(found.low) and isnan(found.high)


def test_equal_differences_have_no_standard_error() -> None:
    assert look_at([0.1 + 0.2, 0.3, 0.3]).standard_error == 0.0
    assert isnan(look_at([0.3]).standard_error)
    assert look_at([1.0, 2.0, 3.0]) == Look(3, 2.0, pytest.approx(1 / np.sqrt(3)))
    with pytest.raises(ValueError, match="at least one"):
        look_at([])


def test_fewer_pairs_than_planned_use_their_own_degrees_of_freedom() -> None:
    """The level of a plain t test holds for an arm that lost runs. The control is the planned quantile."""
    differences = np.random.default_rng(5).standard_normal((4_000, 4))
    looks = [look_at(each) for each in differences.tolist()]
    found = [decide({"a": [look]}, (8,), delta=None, lower_is_better=True)["a"].decision for look in looks]
    planned = [abs(look.mean) > stats.t.isf(0.025, 7) * look.standard_error for look in looks]
    assert np.mean([each != "undecided" for each in found]) <= 0.05 + 3 * np.sqrt(0.05 / 4_000)
    assert np.mean(planned) > 0.07


LOOKS = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(0.01, 2)), min_size=1, max_size=len(SIZES)
).map(lambda values: [Look(size, *each) for size, each in zip(SIZES, values, strict=False)])  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("abcd"), LOOKS, min_size=1), st.sampled_from([None, 1.0]))
def test_the_properties_of_decisions(looks: dict[str, list[Look]], delta: float | None) -> None:
    found = decide(looks, SIZES, delta=delta, lower_is_better=True)
    mirrored = decide(
        {label: [replace(look, mean=-look.mean) for look in arm] for label, arm in looks.items()},
        SIZES, delta=delta, lower_is_better=False,
    )  # fmt: skip
    in_units = decide(
        {label: [Look(look.num_pairs, 8 * look.mean, 8 * look.standard_error) for look in arm]
         for label, arm in looks.items()}, SIZES, delta=delta and 8 * delta, lower_is_better=True,
    )  # fmt: skip
    for label, arm in found.items():
        assert arm.decision == mirrored[label].decision == in_units[label].decision
        is_different = arm.decision in ("better", "worse")
        assert is_different == (arm.low > 0 or arm.high < 0)
        assert not is_different or (arm.look.mean < 0) == (arm.decision == "better")
        assert arm.decision != "the same" or arm.is_within_delta
        assert not arm.is_within_delta or (delta is not None and abs(arm.look.mean) < delta)
        width = two_sided_boundaries(SIZES, arm.level)[SIZES.index(arm.look.num_pairs)] * arm.look.standard_error
        assert arm.high - arm.low == pytest.approx(2 * width)


@settings(deadline=None, max_examples=40)
@given(st.lists(LOOKS.filter(lambda arm: len(arm) == len(SIZES)), min_size=1, max_size=4), st.integers(1, 5))
def test_later_looks_do_not_change_a_decision(arms: list[list[Look]], num_looks: int) -> None:
    looks = {str(number): arm for number, arm in enumerate(arms)}
    early = decide({label: arm[:num_looks] for label, arm in looks.items()}, SIZES, delta=1.0, lower_is_better=True)
    late = decide(looks, SIZES, delta=1.0, lower_is_better=True)
    for label, arm in early.items():
        assert arm.decision == "undecided" or (late[label].decision, late[label].look) == (arm.decision, arm.look)


def test_invalid_arguments_are_refused() -> None:
    good = {"a": [Look(3, 0.0, 1.0)]}
    for looks, sizes, delta in (
        ({"a": []}, SIZES, 1.0),
        (good, (), 1.0),
        (good, SIZES, 0.0),
        ({"a": good["a"] * 2}, (3,), 1.0),
    ):
        with pytest.raises(ValueError, match=r"a: has|sizes=|delta="):
            decide(looks, sizes, delta=delta, lower_is_better=True)  # type: ignore[arg-type]
