"""Comparison of groups of runs with a baseline group. The differences between runs with the same seed are tested."""

from collections.abc import Sequence
from dataclasses import replace

from wmtp.report.comparability import common_loss, require_comparable, require_same_data
from wmtp.report.differences import DecisionRule, metric_comparison
from wmtp.report.grouping import group_with_failed, unequal_search_note
from wmtp.report.measures import group_means
from wmtp.report.metrics import metric_values, pass_at_k_values
from wmtp.report.paired_groups import PairedGroups, finished_runs, pair_by_seed
from wmtp.report.results import BestOrLast, Comparison, TokensToTarget
from wmtp.report.run_record import RunRecord
from wmtp.report.tokens_to_target import tokens_to_target

SECOND_METRIC = "pass@1"
"""Metric that is compared in addition to the metric that the user requested, if all runs have it."""


def compare_runs(
    runs: Sequence[RunRecord],
    *,
    baseline: str = "baseline",
    metric: str = "val/loss",
    at: BestOrLast = "best",
    delta: float | None = None,
) -> Comparison:
    """Compare groups of runs with the baseline group, by the differences between runs with the same seed.

    Args:
        runs: runs in any state. Only finished runs are compared.
        baseline: label of the baseline group, or a part of that label that no other label contains.
        metric: name of the metric: a validation metric such as `val/loss`, a measure of the weights such as
            `decisive_wrong_auc`, `pass@k` such as `pass@1`, or `sampled_pass@1`.
        at: model whose validation metrics are compared: "best" for the best checkpoint, "last" for the model at the
            end of the training. `at` is ignored for other metrics.
        delta: largest difference in the metric that does not matter. With it, a verdict can be "the same".

    Raises:
        InputError: no group has a seed in common with the baseline; the baseline or the metric is unknown; the runs
            use different data or tokenizers; or the metric is a mean over prediction heads and the runs have different
            numbers of heads.
    """
    notes: list[str] = []
    done = finished_runs(runs, notes)
    failed = [run for run in runs if run.status.get("state") == "FAILED"]
    notes += require_same_data(done)
    require_comparable(metric, done)
    groups, lost = group_with_failed(done, failed, notes)
    if (note := unequal_search_note(groups)) is not None:
        notes.append(note)
    return compare_groups(pair_by_seed(groups, baseline, lost, notes), metric, at, DecisionRule(delta), notes)


def compare_groups(
    paired: PairedGroups, metric: str, at: BestOrLast, rule: DecisionRule, notes: list[str]
) -> Comparison:
    """Compare groups of finished runs with their baseline group. Notes are added to `notes`.

    Raises:
        InputError: as `compare_runs`.
    """
    compared = [run for group in paired.groups.values() for run in group.values()]
    requested = metric_values(metric, compared, at)
    metrics = [metric_comparison(paired, requested, rule, notes)]
    if metric != SECOND_METRIC and (second := pass_at_k_values(1, compared)) is not None:
        metrics.append(metric_comparison(paired, second, replace(rule, delta=None), notes))
    loss = common_loss(compared, metric)
    groups = {label: list(group.values()) for label, group in paired.groups.items()}
    reach = all_tokens_to_target(paired, loss, notes)
    return Comparison(
        paired.baseline, metrics, groups, loss, reach, list(dict.fromkeys(notes)), group_means(groups, at)
    )


def all_tokens_to_target(paired: PairedGroups, metric: str, notes: list[str]) -> list[TokensToTarget]:
    """Return, for each group, the numbers of tokens that its runs needed to reach the baseline's best loss.

    The list is empty if a run did not record its number of tokens.
    """
    found = [tokens_to_target(label, paired.pairs(label), metric) for label in paired.others]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        notes.append(
            f"tokens to reach the baseline's best {metric} are left out: not every metrics.jsonl records tokens"
        )
        return []
    return known
