"""Comparison of groups of runs with a baseline group. The differences between runs with the same seed are tested."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from wmtp.errors import InputError
from wmtp.report.comparability import common_loss, require_comparable, require_same_data
from wmtp.report.measures import group_means
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
from wmtp.report.study import RunsBySeed, Study, finished_runs, pair_by_seed
from wmtp.report.tokens_to_target import tokens_to_target

SECOND_METRIC = "pass@1"
"""Metric that is compared in addition to the metric that the user requested, if all runs have it."""


def compare_runs(
    runs: Sequence[RunRecord], *, baseline: str = "baseline", metric: str = "val/loss", at: BestOrLast = "best"
) -> Comparison:
    """Compare groups of runs with the baseline group, by the differences between runs with the same seed.

    Args:
        runs: runs in any state. Only finished runs are compared.
        baseline: label of the baseline group, or a part of that label that no other label contains.
        metric: name of the metric: a validation metric such as `val/loss`, a measure of the weights such as
            `decisive_wrong_auc`, `pass@k` such as `pass@1`, or `sampled_pass@1`.
        at: model whose validation metrics are compared: "best" for the best checkpoint, "last" for the model at the
            end of the training. `at` is ignored for other metrics.

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
    groups = {label: list(group.values()) for label, group in study.groups.items()}
    reach = all_tokens_to_target(study, loss, notes)
    return Comparison(study.baseline, metrics, groups, loss, reach, list(dict.fromkeys(notes)), group_means(groups, at))


def metric_comparison(study: Study, metric: MetricValues, notes: list[str]) -> MetricComparison:
    """Compare the values of one metric between each group and the baseline.

    Raises:
        InputError: a group has no finite value, or there is no pair in which both runs have a finite value.
    """
    notes += metric.notes
    failed_runs = {label: study.failed_runs(label, metric) for label in study.groups}
    values = [group_values(label, group, metric, failed_runs[label]) for label, group in study.groups.items()]
    pairs = {label: found for label in study.others if (found := differences(study, label, metric))}
    if not pairs:
        raise InputError(f"metric={metric.name}: no pair of runs has a finite value; choose another metric")
    estimates = {label: estimate_mean_difference(list(found.values())) for label, found in pairs.items()}
    wilcoxon = {label: wilcoxon_p(list(found.values())) for label, found in pairs.items()}
    mcnemar_tests = {label: mcnemar(study, label, metric) for label in pairs}
    p_holm = holm_by_group({label: estimate.p for label, estimate in estimates.items()})
    wilcoxon_holm = holm_by_group(wilcoxon)
    mcnemar_holm = holm_by_group({label: test.p if test else None for label, test in mcnemar_tests.items()})
    result = list[Difference]()
    for label, found in pairs.items():
        estimate, lost, baseline_lost = estimates[label], failed_runs[label], failed_runs[study.baseline]
        mean_difference = round(estimate.mean, 12) + 0.0  # remove rounding errors and the sign of −0.0
        needed = None
        if estimate.p is not None:
            needed = seeds_needed(mean_difference, stdev(found.values()), num_comparisons=len(pairs))
        result.append(Difference(
            label=label, pairs=found,
            mean=mean_difference, low=estimate.low, high=estimate.high, p=estimate.p, p_holm=p_holm[label],
            wilcoxon=wilcoxon[label], wilcoxon_holm=wilcoxon_holm[label],
            wilcoxon_floor=smallest_wilcoxon_p(len(found)),
            mcnemar=mcnemar_tests[label], mcnemar_holm=mcnemar_holm[label],
            verdict=verdict(found, p_holm[label], metric.lower_is_better, lost, baseline_lost),
            seeds_needed=needed, lost=lost, baseline_lost=baseline_lost,
        ))  # fmt: skip
        add_limit_notes(metric.name, result[-1], notes)
    notes += [
        f"{label}: {each}; {metric.name} covers only the other runs"
        for label, each in failed_runs.items()
        if each.failed
    ]
    return MetricComparison(metric.name, metric.lower_is_better, metric.at, values, result)


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
