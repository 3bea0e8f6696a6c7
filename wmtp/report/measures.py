"""Measures of runs that are shown together: of the policy, and of how well weights identify harmful tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from wmtp.report.run_record import RunRecord

EXPLAINED_VARIANCE = "val/value_explained_variance"
SAMPLED_PASS = "sampled_pass@1"
"""Name of the estimate of pass@1 at temperature 1, which a run with attempts makes at its end."""


@dataclass(frozen=True)
class WeightMeasure:
    """The meaning of a measure of weights."""

    description: str
    chance: str
    """The value for random weights, as text."""


WEIGHT_MEASURES = {
    "decisive_wrong_auc": WeightMeasure(
        "Wrong solutions: first decisive token against the other tokens, area under the ROC curve", "0.5"
    ),
    "decisive_wrong_top1": WeightMeasure(
        "Wrong solutions: share in which the first decisive token has the lowest weight", "1 / number of tokens"
    ),
    "noise_auc": WeightMeasure("All solutions: noise tokens against the other tokens, area under the ROC curve", "0.5"),
    EXPLAINED_VARIANCE: WeightMeasure("Value head: share of the rewards' variance that the values explain", "0"),
}
MODEL_LABELS = {"best": "best checkpoint", "last": "last model"}
POLICY_MEASURES = (
    "val/canonical_logprob", "val/canonical_probability", "val/pass_rate", "val/sampled_pass_rate", SAMPLED_PASS,
)  # fmt: skip


@dataclass(frozen=True)
class GroupMeans:
    """Means of several measures over the runs of each group. They are shown without tests."""

    title: str
    measures: list[str]
    """Names of the measures that at least one run has."""
    means: dict[str, list[float | None]]
    """For each group, the mean of each measure over the runs that have it, or None if no run of the group has it."""


def weights_and_values(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures `WEIGHT_MEASURES` of the last model that are known, from the content of summary.json."""
    found = {**(summary.get("weights") or {})}
    found[EXPLAINED_VARIANCE] = (summary.get("last") or {}).get(EXPLAINED_VARIANCE)
    return {name: float(found[name]) for name in WEIGHT_MEASURES if found.get(name) is not None}


def measured_values(run: RunRecord, at: str) -> dict[str, float]:
    """Return everything that a finished run has measured as a single number, by name.

    Validation metrics are those of the best checkpoint if `at` is "best", and of the last model if it is "last". Other
    measures, which are made only at the end of a run, are those of the last model.
    """
    summary = run.summary
    found = {name: value for name, value in weights_and_values(summary).items() if not name.startswith("val/")}
    for name in ("pass@1", SAMPLED_PASS):
        if (estimate := summary.get(name)) is not None:
            found[name] = float(estimate["value"])
    validation = summary.get(at) or {}
    return found | {name: float(value) for name, value in validation.items() if name.startswith("val/")}


def group_means(groups: Mapping[str, Sequence[RunRecord]], at: str) -> list[GroupMeans]:
    """Return the means of the measures of policies and of weights in each group of finished runs.

    Measures that no run has are left out. `at` is the model whose validation metrics are used for policies, "best" or
    "last".
    """
    policies = {label: [measured_values(run, at) for run in runs] for label, runs in groups.items()}
    weights = {label: [weights_and_values(run.summary) for run in runs] for label, runs in groups.items()}
    tables = (
        _means(f"Policy, {MODEL_LABELS[at]}", POLICY_MEASURES, policies),
        _means(f"Weights and values, {MODEL_LABELS['last']}", WEIGHT_MEASURES, weights),
    )
    return [table for table in tables if table.measures]


def _means(title: str, names: Iterable[str], groups: Mapping[str, Sequence[Mapping[str, float]]]) -> GroupMeans:
    """Return the means over the runs of each group. A run is represented by its values by name."""
    known = [name for name in names if any(name in values for runs in groups.values() for values in runs)]
    means = {
        label: [mean(found) if (found := [values[name] for values in runs if name in values]) else None
                for name in known]
        for label, runs in groups.items()
    }  # fmt: skip
    return GroupMeans(title, known, means)
