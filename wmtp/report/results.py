"""Data classes for the results of a comparison."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wmtp.field_types import PositiveFloat
from wmtp.report.measures import GroupMeans
from wmtp.report.run_record import RunRecord

Verdict = Literal["better", "worse", "the same", "undecided", "too few seeds", "runs failed"]
BestOrLast = Literal["best", "last"]


@dataclass(frozen=True)
class FailedRuns:
    """The number of failed runs of a group, and the total number of its runs. Each seed counts as one run.

    A run counts as failed if it ended with an error, or if its value of the compared metric is not finite.
    """

    failed: int
    runs: int
    """Number of all runs of the group, including the failed runs."""

    def __str__(self) -> str:
        return f"{self.failed} of {self.runs} runs failed"


@dataclass(frozen=True)
class GroupValues:
    """The values of one metric in one group of runs."""

    label: str
    values_by_seed: dict[int, float]
    mean: float
    deviation: float | None
    """Sample standard deviation over the seeds of the group, or None if the group has only one value."""
    lost: FailedRuns
    """Number of runs of the group that have no value of the metric."""


@dataclass(frozen=True)
class McNemar:
    """The result of McNemar's test, which compares how many test problems two models solved.

    The model of the group wins a test problem if its pass rate on the problem exceeds that of the baseline's model.
    """

    won: int
    lost: int
    tied: int
    p: float
    """p-value of the two-sided exact binomial test of `won` against `lost`."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between a group and the baseline in one metric, with statistical tests.

    For each seed, the value of the baseline's run is subtracted from the value of the group's run.
    """

    label: str
    pairs: dict[int, float]
    """For each seed, the difference between the two runs with this seed."""
    mean: float
    low: float | None
    """Lower end of the interval of the mean difference. It is None if `p` is None.

    In a study with several looks, it is the repeated interval, which holds at all looks together. For pass@k, the
    interval covers the choice of the test problems as well as the seeds.
    """
    high: float | None
    level: float
    """Probability with which the interval misses the true difference: 0.05, or less after a study's correction."""
    p: float | None
    """p-value of the mean difference before Holm's correction.

    It is None if there are too few pairs for a test, or if the difference is the same for every seed.
    """
    p_holm: float | None
    """p-value of the mean difference after Holm's correction for the number of compared groups."""
    wilcoxon: float | None
    """p-value of Wilcoxon's two-sided signed-rank test before Holm's correction."""
    wilcoxon_holm: float | None
    wilcoxon_floor: float
    """Smallest p-value that the signed-rank test can give for this number of pairs. For five pairs, it is 0.0625."""
    permutation: float | None
    """p-value of the permutation test, which exchanges the two runs of a pair, before Holm's correction."""
    mcnemar: McNemar | None
    """Result of McNemar's test of two models.

    It is None if the metric is not pass@k, if there are several pairs, or if a run has no graded test problems.
    """
    verdict: Verdict
    """Verdict at the 5 % level with Holm's correction for the number of groups.

    "the same" means that the difference is shown to be within ± δ. If the favored side has failed runs, then the
    verdict is "runs failed".
    """
    is_within_delta: bool | None
    """Whether the difference is shown to be within ± δ, which can also be true of a better or worse group.

    None if there is no δ.
    """
    seeds_needed: int | None
    """Number of seeds with which the test shows a difference of this size with a probability of about 80 %.

    It takes into account that few pairs overstate an effect. `SEEDS_CAP` + 1 means that more than `SEEDS_CAP` seeds
    are needed. None means that the number cannot be estimated.
    """
    lost: FailedRuns
    """Number of runs of the group that have no value of the metric."""
    baseline_lost: FailedRuns
    """Number of runs of the baseline that have no value of the metric."""


@dataclass(frozen=True)
class MetricComparison:
    """The values of one metric in all groups, and the difference of each group from the baseline."""

    metric: str
    lower_is_better: bool
    at: str
    """Description of the model whose metric was measured: "best checkpoint", "last model", or an evaluation's name."""
    delta: float | None
    """Largest difference that does not matter (δ), or None."""
    groups: list[GroupValues]
    """Values of each group. The first group is the baseline."""
    differences: list[Difference]
    """Difference from the baseline for each other group in which at least one pair of runs has finite values."""


@dataclass(frozen=True)
class TokensToTargetPair:
    """The numbers of tokens after which a run and the baseline's run with the same seed reached a target loss.

    The tokens of stage 1 are included.
    """

    seed: int
    target: float
    """Target loss, which is the best validation loss of the baseline's run."""
    baseline_tokens: float
    tokens: float | None
    """Number of tokens, interpolated between validations, or None if the run never reached the target."""
    baseline_stage_tokens: int
    """Number of tokens of stage 1 in the baseline's run, which are included in `baseline_tokens`."""
    stage_tokens: int


@dataclass(frozen=True)
class TokensToTarget:
    """The tokens that the runs of a group needed to reach the baseline's best loss, relative to the baseline.

    A ratio below 1 means that the group needed fewer tokens than the baseline.
    """

    label: str
    metric: str
    """Name of the validation loss, equal to `Comparison.loss`."""
    pairs: list[TokensToTargetPair]
    never: int
    """Number of pairs in which the group's run never reached the target loss. Their ratio counts as infinite."""
    ratio: float | None
    """Median ratio over the pairs, or None if the median is infinite."""
    has_interval: bool
    """Whether there are enough pairs for an interval of the median ratio."""
    low: float | None
    """Lower end of the 95 % interval of the median ratio, or None if it is infinite or if there is no interval."""
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """The complete result of comparing groups of runs with a baseline group."""

    baseline: str
    metrics: list[MetricComparison]
    """Comparison of each metric. The first metric is the metric that the user requested."""
    groups: dict[str, list[RunRecord]]
    """Compared runs of each group, with one run per seed. The keys are group labels, and the first is the baseline."""
    loss: str
    """Name of the validation loss that is used for the loss curves and for `tokens_to_target`."""
    tokens_to_target: list[TokensToTarget]
    """Tokens that each group needed to reach the baseline's best loss.

    The list is empty if a run did not record its number of tokens.
    """
    notes: list[str] = field(default_factory=list)
    """Messages about runs that were left out, unpaired seeds, and tests that cannot show a difference."""
    means: list[GroupMeans] = field(default_factory=list)
    """Means of measures of the policies and of the weights in each group, without tests."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The keys of the config file compare.yaml."""

    runs: list[str]
    baseline: str
    metric: str
    at: BestOrLast
    delta: PositiveFloat | None
    folder: Path | None
    reports: bool


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain types for compare.json. Each run is represented by its name, folder and seed."""
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
        "means": [asdict(each) for each in comparison.means],
    }
