"""The difference between each group of runs and the baseline in one metric, with tests and a verdict."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray

from wmtp.errors import InputError
from wmtp.report.metrics import MetricValues
from wmtp.report.paired_groups import PairedGroups, RunsBySeed
from wmtp.report.results import Difference, FailedRuns, GroupValues, McNemar, MetricComparison, Verdict
from wmtp.statistics.clustered import clustered_estimate, clustered_standard_error
from wmtp.statistics.decisions import ArmDecision, Look, decide, look_at
from wmtp.statistics.paired import (
    LEVEL,
    MIN_PAIRS,
    Estimate,
    estimate_mean_difference,
    holm,
    mcnemar_p,
    permutation_p,
    smallest_wilcoxon_p,
    wilcoxon_p,
)
from wmtp.statistics.power import seeds_needed


@dataclass(frozen=True)
class DecisionRule:
    """The rule by which verdicts follow from differences."""

    delta: float | None = None
    """Largest difference in the metric that does not matter, or None if every difference matters."""
    looks: tuple[int, ...] | None = None
    """Numbers of seeds after which a study looks at its results. None: there is one look, at all pairs."""
    seeds: tuple[int, ...] = ()
    """The seeds of a study in the order in which they are used."""
    num_reached: Mapping[str, int] = field(default_factory=dict)
    """For each group of a study, the number of these seeds whose runs have ended."""
    num_comparisons: int | None = None
    """Number of groups that a study compares with the baseline. None: all groups that have a pair of runs."""

    @property
    def min_pairs(self) -> int:
        """The number of pairs without which there is no verdict."""
        return MIN_PAIRS if self.looks is None else self.looks[0]

    def seeds_of(self, label: str) -> tuple[int, ...] | None:
        """Return the seeds that a study used for a group until its last look. None: there are no looks."""
        return None if self.looks is None else self.seeds[: self.num_reached[label]]


@dataclass(frozen=True)
class PairedMetric:
    """The differences in one metric between the paired runs of a group and of the baseline."""

    values: dict[int, float]
    """Difference by seed."""
    problems: dict[int, dict[str, float]]
    """For pass@k: difference of the pass rates by seed and problem. Empty for other metrics."""

    def estimate(self) -> Estimate:
        """Return the mean difference over all seeds with its interval.

        For pass@k, the interval covers the choice of the problems as well as the seeds.
        """
        if self.problems and len(self.values) >= MIN_PAIRS:
            return clustered_estimate(self._matrix(list(self.values)))
        return estimate_mean_difference(list(self.values.values()))

    def look(self, seeds: Iterable[int]) -> Look:
        """Return the summary of the differences for some seeds, for a decision."""
        used = [seed for seed in seeds if seed in self.values]
        if not used:
            return Look(0, math.nan, math.nan)
        if self.problems and len(used) >= MIN_PAIRS:
            matrix = self._matrix(used)
            return Look(len(used), float(matrix.mean()), clustered_standard_error(matrix))
        return look_at([self.values[seed] for seed in used])

    def _matrix(self, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return the differences of pass rates as float[seed, problem], for the problems that all seeds have."""
        common = sorted(set.intersection(*(set(self.problems[seed]) for seed in seeds)))
        return np.array([[self.problems[seed][task] for task in common] for seed in seeds])


def metric_comparison(
    paired: PairedGroups, metric: MetricValues, rule: DecisionRule, notes: list[str]
) -> MetricComparison:
    """Compare the values of one metric between each group and the baseline.

    Raises:
        InputError: a group has no finite value, or there is no pair in which both runs have a finite value.
    """
    notes += metric.notes
    failed_runs = {label: paired.failed_runs(label, metric) for label in paired.groups}
    values = [group_values(label, group, metric, failed_runs[label]) for label, group in paired.groups.items()]
    found = {label: paired_metric(paired, label, metric) for label in paired.others}
    found = {label: each for label, each in found.items() if each.values}
    if not found:
        raise InputError(f"metric={metric.name}: no pair of runs has a finite value; choose another metric")
    decisions = decide_groups(found, rule, lower_is_better=metric.lower_is_better)
    estimates = {label: each.estimate() for label, each in found.items()}
    p_holm = holm_by_group({label: estimate.p for label, estimate in estimates.items()})
    wilcoxon = {label: wilcoxon_p(list(each.values.values())) for label, each in found.items()}
    wilcoxon_holm = holm_by_group(wilcoxon)
    result = list[Difference]()
    for label, each in found.items():
        estimate, decision = estimates[label], decisions[label]
        mean_difference = round(estimate.mean, 12) + 0.0  # also removes the sign of −0.0
        lost, baseline_lost = (
            paired.failed_runs(side, metric, rule.seeds_of(label)) for side in (label, paired.baseline)
        )
        pairs = list(each.values.values())
        low, high, level = interval(estimate, decision, len(pairs), rule)
        needed = None if estimate.p is None else seeds_needed(mean_difference, stdev(pairs), len(found), len(pairs))
        result.append(Difference(
            label=label, pairs=each.values, mean=mean_difference, low=low, high=high, level=level,
            p=estimate.p, p_holm=p_holm[label],
            wilcoxon=wilcoxon[label], wilcoxon_holm=wilcoxon_holm[label],
            wilcoxon_floor=smallest_wilcoxon_p(len(pairs)), permutation=permutation_p(pairs),
            mcnemar=mcnemar(paired, label, metric),
            verdict=verdict(decision, has_enough_seeds=len(pairs) >= rule.min_pairs, failed=lost,
                            baseline_failed=baseline_lost),
            is_within_delta=None if rule.delta is None else decision.is_within_delta,
            seeds_needed=needed, lost=lost, baseline_lost=baseline_lost,
        ))  # fmt: skip
        add_limit_notes(metric.name, result[-1], notes)
    notes += [
        f"{label}: {each}; {metric.name} covers only the other runs"
        for label, each in failed_runs.items()
        if each.failed
    ]
    return MetricComparison(metric.name, metric.lower_is_better, metric.at, rule.delta, values, result)


def decide_groups(
    found: Mapping[str, PairedMetric], rule: DecisionRule, *, lower_is_better: bool
) -> dict[str, ArmDecision]:
    """Return the decision about each group. It replays all looks of a study, or makes one look at all pairs."""
    if rule.looks is None:
        sizes: tuple[int, ...] = (max(MIN_PAIRS, *(len(each.values) for each in found.values())),)
        looks = {label: [each.look(each.values)] for label, each in found.items()}
    else:
        sizes = rule.looks
        looks = {
            label: [each.look(rule.seeds[:size]) for size in sizes if size <= max(rule.num_reached[label], sizes[0])]
            for label, each in found.items()
        }
    return decide(looks, sizes, delta=rule.delta, lower_is_better=lower_is_better, num_comparisons=rule.num_comparisons)


def holm_by_group(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the p-value of each group after Holm's correction. A group without a test has the value None."""
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def group_values(label: str, group: RunsBySeed, metric: MetricValues, failed_runs: FailedRuns) -> GroupValues:
    """Return the finite values of a metric in one group, with their mean and standard deviation.

    Raises:
        InputError: no run of the group has a finite value.
    """
    values = {seed: metric.values[run] for seed, run in group.items() if run in metric.values}
    if not values:
        raise InputError(f"metric={metric.name}: no run of {label} has a finite value; choose another metric")
    deviation = stdev(values.values()) if len(values) > 1 else None
    return GroupValues(label, values, mean(values.values()), deviation, failed_runs)


def paired_metric(paired: PairedGroups, label: str, metric: MetricValues) -> PairedMetric:
    """Return the values of the group minus the values of the baseline, for all seeds for which both are finite."""
    pairs = {
        seed: (base, run)
        for seed, (base, run) in paired.pairs(label).items()
        if base in metric.values and run in metric.values
    }
    values = {seed: metric.values[run] - metric.values[base] for seed, (base, run) in pairs.items()}
    solved = {seed: (metric.solved.get(base), metric.solved.get(run)) for seed, (base, run) in pairs.items()}
    problems = {
        seed: {task: run[task] - base[task] for task in base.keys() & run.keys()}
        for seed, (base, run) in solved.items()
        if base and run
    }
    return PairedMetric(values, problems if len(problems) == len(values) else {})


def mcnemar(paired: PairedGroups, label: str, metric: MetricValues) -> McNemar | None:
    """Return McNemar's test over problems if the group and the baseline have one run each, otherwise None.

    The test is about two trained models. With several seeds, it would also find differences between two sets of runs
    of one method. The result is also None if a run has no graded problems.
    """
    pairs = list(paired.pairs(label).values())
    if len(pairs) != 1:
        return None
    base, run = (metric.solved.get(each) for each in pairs[0])
    if not base or not run:
        return None
    gains = [round(run[task] - base[task], 9) for task in sorted(base.keys() & run.keys())]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return McNemar(won, lost, len(gains) - won - lost, mcnemar_p(won, lost))


def interval(
    estimate: Estimate, decision: ArmDecision, num_pairs: int, rule: DecisionRule
) -> tuple[float | None, float | None, float]:
    """Return the ends and the level of the interval of a mean difference. In a study, it is the repeated interval."""
    if rule.looks is None:
        return estimate.low, estimate.high, LEVEL
    if num_pairs < rule.min_pairs or not np.isfinite(decision.low):
        return None, None, decision.level
    return decision.low, decision.high, decision.level


def verdict(
    decision: ArmDecision, *, has_enough_seeds: bool, failed: FailedRuns, baseline_failed: FailedRuns
) -> Verdict:
    """Return the verdict on a group.

    If the decision is in favor of a side that has failed runs, or says that both are the same although one of them has
    failed runs, then the verdict is "runs failed".
    """
    if not has_enough_seeds:
        return "too few seeds"
    favored = {
        "better": failed.failed,
        "worse": baseline_failed.failed,
        "the same": failed.failed + baseline_failed.failed,
    }
    return "runs failed" if favored.get(decision.decision, 0) else decision.decision


def add_limit_notes(metric: str, difference: Difference, notes: list[str]) -> None:
    """Add notes to `notes` if a statistical test of a difference cannot show an effect.

    The reason is that there are too few pairs of runs, or that the difference is the same for every seed.
    """
    num = len(difference.pairs)
    if num < MIN_PAIRS:
        notes.append(f"{difference.label}: {num} pair of runs cannot rule out chance; train at least {MIN_PAIRS} seeds")
    elif difference.p is None:
        notes.append(
            f"{difference.label}: the difference in {metric} is the same for every seed, so it cannot be tested"
        )
    if difference.mcnemar is not None:
        notes.append(
            f"{difference.label}: McNemar's test is about these two models on these problems, not about the method"
        )
    if num >= MIN_PAIRS and difference.wilcoxon_floor > LEVEL:
        floor = f"{difference.wilcoxon_floor:.4g}"
        notes.append(
            f"with {num} pairs the signed-rank test cannot give a p below {floor}, so it cannot show a difference"
        )
