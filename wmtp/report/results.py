"""Data classes for the results of a comparison."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wmtp.report.run_record import RunRecord

Verdict = Literal["better", "worse", "no difference shown", "too few seeds", "runs failed"]
BestOrLast = Literal["best", "last"]


@dataclass(frozen=True)
class FailedRuns:
    """Number of runs of a group without a value, at most one per seed: failed, or the value is not finite."""

    failed: int
    runs: int
    """All runs of the group, including the failed ones."""

    def __str__(self) -> str:
        return f"{self.failed} of {self.runs} runs failed"


@dataclass(frozen=True)
class GroupValues:
    """Values of one metric in one group."""

    label: str
    values_by_seed: dict[int, float]
    mean: float
    deviation: float | None
    """Standard deviation over seeds (n − 1 in the denominator); None for one run."""
    lost: FailedRuns
    """Runs of the group without a value."""


@dataclass(frozen=True)
class McNemar:
    """McNemar's test on the test problems of two groups; a group wins a problem if more of its seeds passed it."""

    won: int
    lost: int
    tied: int
    p: float
    """Two-sided exact binomial test of `won` against `lost`."""


@dataclass(frozen=True)
class Difference:
    """Difference of a group from the baseline: group − baseline for runs with the same seed."""

    label: str
    pairs: dict[int, float]
    """Difference by seed."""
    mean: float
    low: float | None
    """95 % interval of the mean difference; None if there are too few pairs."""
    high: float | None
    p: float | None
    """p-value of the mean difference before Holm's correction; below 0.05 if the interval excludes 0."""
    p_holm: float | None
    """p-value corrected for the number of compared groups; the verdict uses it."""
    wilcoxon: float | None
    """p-value of the two-sided signed-rank test."""
    wilcoxon_holm: float | None
    wilcoxon_floor: float
    """Smallest p-value that the signed-rank test can give for this number of pairs: 0.0625 for five."""
    mcnemar: McNemar | None
    """Only for pass@k."""
    mcnemar_holm: float | None
    verdict: Verdict
    """Verdict from `p_holm` and the direction of the metric.

    "runs failed": the difference favors a side that has failed runs.
    """
    seeds_needed: int | None
    """Number of seeds that show a true difference of this size with 80 % power at the corrected level.

    `SEEDS_CAP` + 1 means more than `SEEDS_CAP`; None if it cannot be estimated.
    """
    lost: FailedRuns
    """Runs of the group without a value."""
    baseline_lost: FailedRuns
    """Runs of the baseline without a value."""


@dataclass(frozen=True)
class MetricComparison:
    """One metric in all groups, and the differences from the baseline."""

    metric: str
    lower_is_better: bool
    at: str
    """Label of the measured model: "best checkpoint", "last model", or the name of an evaluation."""
    groups: list[GroupValues]
    """The baseline first."""
    differences: list[Difference]
    """One for each group other than the baseline."""


@dataclass(frozen=True)
class TokensToTargetPair:
    """Tokens until two runs of one seed reached the baseline's best loss, including stage 1."""

    seed: int
    target: float
    """Best loss of the baseline run."""
    baseline_tokens: float
    tokens: float | None
    """Interpolated between validations; None if the target was never reached."""
    baseline_stage_tokens: int
    """Tokens of the baseline's stage 1, included in `baseline_tokens`."""
    stage_tokens: int


@dataclass(frozen=True)
class TokensToTarget:
    """Tokens to the baseline's best loss, as ratios group / baseline; below 1 is faster."""

    label: str
    metric: str
    """Name of the loss, equal to `Comparison.loss`."""
    pairs: list[TokensToTargetPair]
    never: int
    """Number of pairs that never reached the target; their ratio counts as infinite."""
    ratio: float | None
    """Median over pairs; None if infinite."""
    has_interval: bool
    """Whether there are enough pairs for an interval."""
    low: float | None
    """95 % interval of the median; None if infinite or if there is no interval."""
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Complete result of `wmtp.compare`."""

    baseline: str
    metrics: list[MetricComparison]
    """The requested metric first."""
    groups: dict[str, list[RunRecord]]
    """Compared runs by group label, one per seed; the baseline first."""
    loss: str
    """Loss of the curves and of `tokens_to_target`, see `common_loss`."""
    tokens_to_target: list[TokensToTarget]
    """Empty if tokens were not recorded; `notes` gives the reason."""
    notes: list[str] = field(default_factory=list)
    """Messages about runs that were left out, unpaired seeds, and tests that cannot show a difference."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Keys of compare.yaml."""

    runs: list[str]
    baseline: str
    metric: str
    at: BestOrLast
    folder: Path | None
    reports: bool


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain types for compare.json; runs become name, folder and seed."""
    groups = {
        label: [{"name": run.name, "folder": str(run.folder), "seed": run.seed} for run in runs]
        for label, runs in comparison.groups.items()
    }
    return {
        "baseline": comparison.baseline,
        "groups": groups,
        "metrics": [asdict(metric) for metric in comparison.metrics],
        "loss": comparison.loss,
        "reach": [asdict(each) for each in comparison.tokens_to_target],
        "notes": comparison.notes,
    }
