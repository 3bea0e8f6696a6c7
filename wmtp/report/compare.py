"""Comparison of groups of runs with a baseline group. Runs are paired by seed, and their differences are tested."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from wmtp.errors import InputError
from wmtp.report.comparability import common_loss, require_comparable, require_same_data
from wmtp.report.grouping import group_runs
from wmtp.report.metrics import MetricValues, metric_values, pass_at_k_values
from wmtp.report.results import (
    BestOrLast,
    Comparison,
    Difference,
    FailedRuns,
    GroupValues,
    McNemar,
    MetricComparison,
    TokensToTarget,
    Verdict,
)
from wmtp.report.run_record import RunRecord
from wmtp.report.statistics import (
    LEVEL,
    MIN_PAIRS,
    estimate_mean_difference,
    holm,
    mcnemar_p,
    seeds_needed,
    smallest_wilcoxon_p,
    wilcoxon_p,
)
from wmtp.report.tokens_to_target import tokens_to_target

SECOND_METRIC = "pass@1"
"""Metric that is compared in addition to the metric that the user requested, if all runs have it."""
RunsBySeed = dict[int, RunRecord]


@dataclass(frozen=True)
class Study:
    """The runs to compare, by group and by seed. The baseline group is the first group."""

    baseline: str
    groups: dict[str, RunsBySeed]
    failed: dict[str, set[int]]
    """For each group, the seeds that have a failed run but no finished run."""

    @property
    def others(self) -> list[str]:
        """Labels of the groups that are compared with the baseline."""
        return [label for label in self.groups if label != self.baseline]

    def pairs(self, label: str) -> dict[int, tuple[RunRecord, RunRecord]]:
        """Return the pair (run of the baseline, run of the group `label`) for each seed that both have in common."""
        base, group = self.groups[self.baseline], self.groups[label]
        return {seed: (base[seed], group[seed]) for seed in sorted(base.keys() & group.keys())}

    def failed_runs(self, label: str, metric: MetricValues) -> FailedRuns:
        """Return how many runs of the group `label` have no value of the metric."""
        group, failed = self.groups[label], len(self.failed.get(label, ()))
        return FailedRuns(failed + sum(run not in metric.values for run in group.values()), failed + len(group))


def compare_runs(
    runs: Sequence[RunRecord], *, baseline: str = "baseline", metric: str = "val/loss", at: BestOrLast = "best"
) -> Comparison:
    """Compare groups of runs with the baseline group, by the differences between runs with the same seed.

    Args:
        runs: runs in any state. Only finished runs are compared.
        baseline: label of the baseline group, or a part of that label that no other label contains.
        metric: name of the metric, either a validation metric such as `val/loss`, or `pass@k` such as `pass@1`.
        at: model whose validation metrics are compared: "best" for the best checkpoint, "last" for the model at the
            end of the training. `at` is ignored if `metric` is `pass@k`.

    Raises:
        InputError: no group has a seed in common with the baseline; the baseline or the metric is unknown; the runs
            use different data or tokenizers; or the metric is a mean over prediction heads and the runs have different
            numbers of heads.
    """
    notes: list[str] = []
    done = finished_runs(runs, notes)
    notes += require_same_data(done)
    require_comparable(metric, done)
    failed = [run for run in runs if run.status.get("state") == "FAILED"]
    study = pair_by_seed(done, failed, baseline, notes)
    compared = [run for group in study.groups.values() for run in group.values()]
    requested = metric_values(metric, compared, at)
    second = pass_at_k_values(1, compared) if metric != SECOND_METRIC else None
    metrics = [metric_comparison(study, each, notes) for each in (requested, second) if each is not None]
    loss = common_loss(compared, metric)
    return Comparison(
        study.baseline, metrics, {label: list(group.values()) for label, group in study.groups.items()}, loss,
        all_tokens_to_target(study, loss, notes), list(dict.fromkeys(notes)),
    )  # fmt: skip


def finished_runs(runs: Sequence[RunRecord], notes: list[str]) -> list[RunRecord]:
    """Return the runs that finished, and add a note to `notes` for each run that did not finish.

    Raises:
        InputError: no run has finished.
    """
    done = [run for run in runs if run.status.get("state") == "FINISHED" and run.summary]
    for run in runs:
        if run not in done:
            state = str(run.status.get("state"))
            reason = "it has no summary.json" if state == "FINISHED" else f"it is {state}, not FINISHED"
            notes.append(f"{run.folder} is left out: {reason}")
    if not done:
        raise InputError(
            f"none of the {len(runs)} runs has finished; wait, or resume them: python -m wmtp.train resume=RUN"
        )
    return done


def pair_by_seed(runs: Sequence[RunRecord], failed: Sequence[RunRecord], baseline: str, notes: list[str]) -> Study:
    """Return the baseline group and all groups that have a seed in common with it.

    Args:
        runs: finished runs.
        failed: failed runs.
        baseline: label of the baseline group, or a part of that label that no other label contains.
        notes: list to which notes on excluded runs and groups are added.

    Raises:
        InputError: there is only one group, the baseline is unknown, or no group has a seed in common with the
            baseline.
    """
    groups = {label: latest_run_per_seed(label, group, notes) for label, group in group_runs(runs).items()}
    if len(groups) < 2:
        raise InputError(
            f"finished runs: {len(runs)}, but they form only one group, because their configs differ at most in the "
            "seed; add runs of another method or setting"
        )
    label = find_baseline(baseline, list(groups))
    base = groups.pop(label)
    kept = {label: base}
    for other, group in groups.items():
        if base.keys() & group.keys():
            kept[other] = group
            add_unpaired_notes(label, base, other, group, notes)
        else:
            notes.append(f"{other} is left out: it has no seed in common with {label}")
    if len(kept) < 2:
        seeds = [f"{name}: seeds {format_seeds(group)}" for name, group in {label: base, **groups}.items()]
        raise InputError("\n  ".join([
            f"no group has a seed in common with the baseline {label}; train with the same seeds", *seeds,
        ]))  # fmt: skip
    return Study(label, kept, failed_seeds(kept, failed, notes))


def failed_seeds(
    groups: Mapping[str, RunsBySeed], failed: Sequence[RunRecord], notes: list[str]
) -> dict[str, set[int]]:
    """Return, for each of `groups`, the seeds that have a failed run but no finished run.

    A note is added to `notes` for failed runs that belong to none of `groups`.
    """
    labels = {run: label for label, group in groups.items() for run in group.values()}
    found: dict[str, set[int]] = {}
    for name, members in group_runs([*labels, *failed]).items():
        seeds = {run.seed for run in members if run not in labels}
        if label := next((labels[run] for run in members if run in labels), None):
            found[label] = seeds - groups[label].keys()
        else:
            notes.append(f"{name} is left out: {FailedRuns(len(seeds), len(seeds))}")
    return found


def latest_run_per_seed(label: str, runs: Sequence[RunRecord], notes: list[str]) -> RunsBySeed:
    """Return a dictionary from each seed to the run of the group with that seed.

    If several runs have the same seed, the run that started last is kept. A note is added for each of the others.
    """
    found: RunsBySeed = {}
    for run in sorted(runs, key=lambda run: str(run.status.get("started"))):
        if (before := found.get(run.seed)) is not None:
            notes.append(
                f"{before.folder} is left out: {run.folder} of {label} also has seed {run.seed}, and started later"
            )
        found[run.seed] = run
    return dict(sorted(found.items()))


def find_baseline(baseline: str, labels: Sequence[str]) -> str:
    """Return the group label that `baseline` refers to.

    A label that is equal to `baseline` has the highest priority. A label that has `baseline` as one of its
    comma-separated parts has the second priority, and a label that contains `baseline` anywhere has the third.

    Raises:
        InputError: no label matches, or several labels match with the same highest priority.
    """
    name = baseline.removeprefix("algo=")
    for matches in (
        lambda label: label == name,
        lambda label: name in label.split(", "),
        lambda label: name in label,
    ):
        found = [label for label in labels if matches(label)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"baseline={baseline}: matches several groups; choose one of them: {format_baselines(found)}"
            )
    raise InputError(f"baseline={baseline}: there is no such group; the groups are {format_baselines(labels)}")


def format_baselines(labels: Sequence[str]) -> str:
    """Return the command-line override `baseline='LABEL'` for each label, separated by commas."""
    return ", ".join(f"baseline='{label}'" for label in labels)


def add_unpaired_notes(baseline: str, base: RunsBySeed, label: str, group: RunsBySeed, notes: list[str]) -> None:
    """Add a note on the seeds that only the baseline has, and a note on the seeds that only the other group has."""
    for one, seeds, other in (
        (baseline, base.keys() - group.keys(), label),
        (label, group.keys() - base.keys(), baseline),
    ):
        if seeds:
            notes.append(
                f"unpaired: {one} has seed {format_seeds(seeds)}, {other} does not; it is excluded from the difference"
            )


def format_seeds(seeds: Sequence[int] | Mapping[int, object] | set[int]) -> str:
    """Return sorted seeds, separated by commas."""
    return ", ".join(str(seed) for seed in sorted(seeds))


def metric_comparison(study: Study, metric: MetricValues, notes: list[str]) -> MetricComparison:
    """Compare the values of one metric between each group and the baseline.

    Raises:
        InputError: a group has no finite value, or there is no pair in which both runs have a finite value.
    """
    notes += metric.notes
    failed_runs = {label: study.failed_runs(label, metric) for label in study.groups}
    values = [group_values(label, group, metric, failed_runs[label]) for label, group in study.groups.items()]
    raw = {label: differences(study, label, metric) for label in study.others}
    estimates = {label: estimate_mean_difference(list(pairs.values())) for label, pairs in raw.items() if pairs}
    if not estimates:
        raise InputError(f"metric={metric.name}: no pair of runs has a finite value; choose another metric")
    labels = list(estimates)
    wilcoxon = [wilcoxon_p(list(raw[label].values())) for label in labels]
    mcnemar_tests = [mcnemar(study, label, metric) for label in labels]
    corrected = holm([estimates[label].p for label in labels])
    wilcoxon_corrected = holm(wilcoxon)
    mcnemar_corrected = holm([None if test is None else test.p for test in mcnemar_tests])
    result = list[Difference]()
    for number, label in enumerate(labels):
        estimate, pairs = estimates[label], raw[label]
        mean_difference = round(estimate.mean, 12) + 0.0  # remove rounding errors and the sign of −0.0
        spread = stdev(pairs.values()) if len(pairs) > 1 else 0.0
        result.append(Difference(
            label, pairs, mean_difference, estimate.low, estimate.high, estimate.p, corrected[number],
            wilcoxon[number], wilcoxon_corrected[number], smallest_wilcoxon_p(len(pairs)),
            mcnemar_tests[number], mcnemar_corrected[number],
            verdict(pairs, corrected[number], metric.lower_is_better, failed_runs[label], failed_runs[study.baseline]),
            None if estimate.p is None else seeds_needed(mean_difference, spread, len(labels)), failed_runs[label],
            failed_runs[study.baseline],
        ))  # fmt: skip
        add_limit_notes(metric.name, result[-1], notes)
    notes += [
        f"{label}: {each}; {metric.name} covers only the other runs"
        for label, each in failed_runs.items()
        if each.failed
    ]
    return MetricComparison(metric.name, metric.lower_is_better, metric.at, values, result)


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


def differences(study: Study, label: str, metric: MetricValues) -> dict[int, float]:
    """Return, for each seed, the value of the group minus the value of the baseline. Both values must be finite."""
    return {
        seed: metric.values[run] - metric.values[base]
        for seed, (base, run) in study.pairs(label).items()
        if base in metric.values and run in metric.values
    }


def mcnemar(study: Study, label: str, metric: MetricValues) -> McNemar | None:
    """Return McNemar's test of a group against the baseline. It uses the problems that were graded in all paired runs.

    The result is None if there are no pairs, or if a paired run has no graded problems.
    """
    pairs = [(metric.solved.get(base), metric.solved.get(run)) for base, run in study.pairs(label).values()]
    known = [(base, run) for base, run in pairs if base and run]
    if not known or len(known) < len(pairs):
        return None
    common = set.intersection(*(base.keys() & run.keys() for base, run in known))
    gains = [round(sum(run[task] - base[task] for base, run in known), 9) for task in sorted(common)]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return McNemar(won, lost, len(gains) - won - lost, mcnemar_p(won, lost))


def verdict(
    pairs: Mapping[int, float],
    p_holm: float | None,
    lower_is_better: bool,
    failed_runs: FailedRuns,
    baseline_failed_runs: FailedRuns,
) -> Verdict:
    """Return the verdict on the difference between a group and the baseline at the 5 % level.

    If the test shows that one of the two is better, but that one has failed runs, then the verdict is "runs failed".

    Args:
        pairs: difference from the baseline by seed.
        p_holm: p-value of the mean difference after Holm's correction.
        lower_is_better: whether lower values of the metric are better.
        failed_runs: failed runs of the group.
        baseline_failed_runs: failed runs of the baseline.
    """
    if len(pairs) < MIN_PAIRS:
        return "too few seeds"
    if p_holm is None or p_holm >= LEVEL:
        return "no difference shown"
    is_better = (sum(pairs.values()) < 0) == lower_is_better
    if (failed_runs if is_better else baseline_failed_runs).failed:
        return "runs failed"
    return "better" if is_better else "worse"


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
    if num >= MIN_PAIRS and difference.wilcoxon_floor > LEVEL:
        floor = f"{difference.wilcoxon_floor:.4g}"
        notes.append(
            f"with {num} pairs the signed-rank test cannot give a p below {floor}, so it cannot show a difference"
        )


def all_tokens_to_target(study: Study, metric: str, notes: list[str]) -> list[TokensToTarget]:
    """Return, for each group, the numbers of tokens that its runs needed to reach the baseline's best loss.

    The list is empty if a run did not record its number of tokens.
    """
    found = [tokens_to_target(label, study.pairs(label), metric) for label in study.others]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        notes.append(
            f"tokens to reach the baseline's best {metric} are left out: not every metrics.jsonl records tokens"
        )
        return []
    return known
