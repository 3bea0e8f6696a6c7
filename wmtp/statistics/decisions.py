"""Decisions on several groups of runs ("arms") that are compared with one baseline while seeds are added.

There are two families of tests: one finds arms that are better or worse than the baseline, the other one finds arms
whose mean difference is within ±δ. In each family, the probability of any false finding is at most the level, over all
arms and all looks, if the differences are normal.

Within a family, the level is divided by the number of arms that are not yet found, as in Holm's correction. This is
valid for repeated looks because boundaries do not increase if the level increases.

Source: Maurer and Bretz 2013, Multiple Testing in Group Sequential Trials Using Graphical Approaches, section 3;
Schuirmann 1987, A Comparison of the Two One-Sided Tests Procedure (tests of equivalence).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from typing import Literal

import numpy as np

from wmtp.statistics.paired import LEVEL, MIN_PAIRS
from wmtp.statistics.sequential import check_sizes, nominal_levels, t_quantile

Decision = Literal["better", "worse", "the same", "undecided"]


@dataclass(frozen=True)
class Look:
    """The differences between one arm and the baseline at one look, summarized."""

    num_pairs: int
    mean: float
    standard_error: float
    """Standard error of the mean. There is no decision at a look at which it is 0 or nan."""

    @property
    def is_testable(self) -> bool:
        """True if the differences can be tested."""
        return (
            self.num_pairs >= MIN_PAIRS
            and isfinite(self.mean)
            and isfinite(self.standard_error)
            and self.standard_error > 0
        )


@dataclass(frozen=True)
class ArmDecision:
    """The decision on one arm."""

    decision: Decision
    look: Look
    """Look at which the decision was made, or the latest look of an undecided arm."""
    low: float
    """Lower end of the repeated confidence interval at `look`, with `level`. It is nan if the look is not testable.

    It excludes 0 exactly if the arm is better or worse. Over all looks, the intervals of an arm with one level contain
    its true mean with a probability of at least 1 − `level`.
    """
    high: float
    level: float
    """Two-sided level of the last test of whether the arm is better or worse, at `look`.

    It is the level of the family divided by the number of arms that were not yet found better or worse.
    """
    is_within_delta: bool
    """Whether the mean difference was found to be within ±δ. An arm that is better or worse can be within ±δ too."""


def look_at(differences: Sequence[float]) -> Look:
    """Return the summary of paired differences. The standard error is nan for one difference and 0 for equal ones.

    Raises:
        ValueError: there is no difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("a look needs at least one difference")
    mean = float(values.mean())
    if len(values) < MIN_PAIRS:
        return Look(len(values), mean, nan)
    # equal differences can have a standard deviation above 0 because of rounding errors
    is_constant = np.ptp(values) <= 1e-12 * np.abs(values).max()
    return Look(len(values), mean, 0.0 if is_constant else float(values.std(ddof=1)) / sqrt(len(values)))


def decide(
    looks: Mapping[str, Sequence[Look]],
    sizes: tuple[int, ...],
    *,
    delta: float | None,
    lower_is_better: bool,
    num_comparisons: int | None = None,
    level: float = LEVEL,
) -> dict[str, ArmDecision]:
    """Decide which arms are better or worse than the baseline, or the same within ±δ, by replaying the looks in order.

    At each look, every arm that has this look and no decision is tested. The tests of a look are repeated with the
    larger level for the remaining arms until nothing changes. A decision is final: later looks of the arm are ignored.
    An arm that is found both better (or worse) and within ±δ at the same look is better (or worse).

    For a single look, `sizes` is `(num_pairs,)`, and the tests are t tests with Holm's correction. If a look has
    another number of pairs than planned, because runs failed, then its p-value is computed with its own number and is
    compared with the planned nominal level.

    Args:
        looks: looks of each arm, by its label. The k-th one belongs to the k-th planned look. There may be fewer looks
            than planned, but at least one.
        sizes: number of pairs at each planned look, increasing, at least 2.
        delta: largest mean difference, in the unit of the differences, at which an arm is the same. None if arms are
            not tested for being the same.
        lower_is_better: whether negative differences are better.
        num_comparisons: number of arms among which a false finding is counted, if it is larger than that of `looks`,
            because some arms have no value yet.
        level: probability of any false finding, for each of the two families.

    Raises:
        ValueError: an arm has no look or more looks than planned, `delta` is not above 0, or the sizes do not increase.
    """
    check_inputs(looks, sizes, delta)
    different, same = set[str](), set[str]()
    num_arms = max(len(looks), num_comparisons or 0)
    levels = dict[str, float]()  # of the last test of each arm
    final = dict[str, tuple[Decision, int]]()  # decision, and number of the look
    for number in range(len(sizes)):
        tests = Tests(sizes, number, delta)
        current = {label: arm[number] for label, arm in looks.items() if len(arm) > number and label not in final}
        found = step_down(current, num_arms - len(different), level, tests.is_different)
        different |= found.keys()
        levels |= dict.fromkeys(current, level / max(1, num_arms - len(different))) | found
        same |= step_down(current, num_arms - len(same), level, tests.is_same).keys()
        for label, look in current.items():
            if label in found:
                final[label] = "better" if (look.mean < 0) == lower_is_better else "worse", number
            elif label in same:
                final[label] = "the same", number
    result = dict[str, ArmDecision]()
    for label, arm in looks.items():
        decision, number = final.get(label, ("undecided", len(arm) - 1))
        look = arm[number]
        width = Tests(sizes, number, delta).half_width(look, levels[label])
        ends = look.mean - width, look.mean + width
        result[label] = ArmDecision(decision, look, *ends, levels[label], is_within_delta=label in same)
    return result


def check_inputs(looks: Mapping[str, Sequence[Look]], sizes: tuple[int, ...], delta: float | None) -> None:
    """Check the arguments of `decide`.

    Raises:
        ValueError: an arm has no look or more looks than planned, `delta` is not above 0, or the sizes do not increase.
    """
    check_sizes(sizes)
    if delta is not None and not delta > 0:
        raise ValueError(f"delta={delta}: must be above 0")
    for label, arm in looks.items():
        if not 0 < len(arm) <= len(sizes):
            raise ValueError(f"{label}: has {len(arm)} looks; must have at least 1 and at most {len(sizes)}")


def step_down(
    current: Mapping[str, Look], num_open: int, level: float, test: Callable[[Look, float], bool]
) -> dict[str, float]:
    """Return the arms that a test finds at one look, and for each of them the level at which it was found.

    The level is divided by the number of arms that are not yet found. Finding an arm increases the level of the others,
    which are then tested again.

    Args:
        current: look of each arm that is tested.
        num_open: number of arms that were not found at earlier looks. It includes arms that are not tested.
        level: level of the family.
        test: function of a look and a level that returns whether the arm is found.
    """
    found = dict[str, float]()
    while num_open > len(found):
        arm_level = level / (num_open - len(found))
        new = {label: arm_level for label, look in current.items() if label not in found and test(look, arm_level)}
        if not new:
            break
        found |= new
    return found


@dataclass(frozen=True)
class Tests:
    """The tests of an arm at one look. Their levels are those over all looks."""

    sizes: tuple[int, ...]
    """Number of pairs at each planned look."""
    number: int
    """Number of the look, from 0."""
    delta: float | None
    """Largest mean difference at which an arm is the same."""

    def is_different(self, look: Look, level: float) -> bool:
        """Return whether the mean differs from 0, by a two-sided test with the level."""
        return look.is_testable and abs(look.mean) > self.half_width(look, level)

    def is_same(self, look: Look, level: float) -> bool:
        """Return whether the mean is within ±δ, by two one-sided tests, each with the level."""
        if self.delta is None or not look.is_testable:
            return False
        nominal = nominal_levels(self.sizes, level, is_two_sided=False)[self.number]
        return self.delta - abs(look.mean) > t_quantile(nominal, look.num_pairs) * look.standard_error

    def half_width(self, look: Look, level: float) -> float:
        """Return half of the width of the repeated confidence interval, which is nan if the look is not testable."""
        if not look.is_testable:
            return nan
        nominal = nominal_levels(self.sizes, level, is_two_sided=True)[self.number]
        return t_quantile(nominal / 2, look.num_pairs) * look.standard_error
