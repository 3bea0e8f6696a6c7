"""Groups of runs against a baseline: which differences the seeds show, and which they do not."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wmtp.report.run_record import RunRecord

Verdict = Literal["better", "worse", "no difference shown", "too few seeds", "runs failed"]
At = Literal["best", "last"]


@dataclass(frozen=True)
class Lost:
    """Runs of a group, a seed once, that give no value: they failed, or it is not finite."""

    failed: int
    runs: int
    """All that the group has, those included."""

    def __str__(self) -> str:
        return f"{self.failed} of {self.runs} runs failed"


@dataclass(frozen=True)
class GroupValues:
    """A metric in one group."""

    label: str
    values_by_seed: dict[int, float]
    mean: float
    deviation: float | None
    """Standard deviation over seeds (n − 1 below the sum); None for one run."""
    lost: Lost


@dataclass(frozen=True)
class McNemar:
    """The same test problems solved by two groups: each problem is won by the group in which more seeds passed it."""

    won: int
    lost: int
    tied: int
    p: float
    """Two-sided exact binomial test of won against lost."""


@dataclass(frozen=True)
class Difference:
    """A group against the baseline: differences of runs with the same seed, the group's less the baseline's."""

    label: str
    pairs: dict[int, float]
    """The difference of each seed."""
    mean: float
    low: float | None
    """95 % interval of the mean difference; None where there are too few pairs for one."""
    high: float | None
    p: float | None
    """The share of confidence that would just not cover 0: the decision's p-value, before Holm's correction."""
    p_holm: float | None
    """Corrected over the groups that are compared; below 0.05 a difference is shown."""
    wilcoxon: float | None
    """Signed-rank test, two-sided."""
    wilcoxon_holm: float | None
    wilcoxon_floor: float
    """The smallest p that this test can give for so many pairs: 0.0625 for five."""
    mcnemar: McNemar | None
    """Only of pass@k."""
    mcnemar_holm: float | None
    verdict: Verdict
    """From `p_holm` and the metric's direction.

    "runs failed": the difference is in favour of a side of which only those are left that did not fail.
    """
    seeds_needed: int | None
    """Seeds with which a true difference of this size is shown with 80 % power at the corrected level.

    `SEEDS_CAP` + 1 says more than `SEEDS_CAP`; None: nothing can be said.
    """
    lost: Lost
    baseline_lost: Lost


@dataclass(frozen=True)
class MetricComparison:
    """One metric in every group, and the differences from the baseline."""

    metric: str
    lower_is_better: bool
    at: str
    """Which model is measured, in words: "best checkpoint", "last model"."""
    groups: list[GroupValues]
    """The baseline first."""
    differences: list[Difference]
    """One for each other group."""


@dataclass(frozen=True)
class ReachPair:
    """Tokens until two runs of one seed were as good as the baseline's best; those of the stage before count."""

    seed: int
    target: float
    """The best loss of the baseline's run."""
    baseline_tokens: float
    tokens: float | None
    """Interpolated between validations; None: never reached."""
    baseline_stage_tokens: int
    """Of the tokens above, those of the stage before the training."""
    stage_tokens: int


@dataclass(frozen=True)
class Reach:
    """Tokens to the baseline's best loss, as ratios group / baseline: below 1 is faster."""

    label: str
    metric: str
    """As `Comparison.loss`."""
    pairs: list[ReachPair]
    never: int
    """Pairs in which the target was never reached; their ratio counts as infinite."""
    ratio: float | None
    """The median over pairs; None: infinite."""
    has_interval: bool
    """Whether there are pairs enough for an interval."""
    low: float | None
    """95 % interval of the median; None: infinite, if there is an interval."""
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """All that `wmtp.compare` says."""

    baseline: str
    metrics: list[MetricComparison]
    """The asked one first."""
    groups: dict[str, list[RunRecord]]
    """The runs that were compared, a seed once, by the label of their group; the baseline first."""
    loss: str
    """What the curves and `reach` are of: the asked metric if it is a loss of validations, else one that all have."""
    reach: list[Reach]
    """Empty where tokens were not recorded; a note then says so."""
    notes: list[str] = field(default_factory=list)
    """What else must be known: runs left out, seeds without a partner, tests that cannot decide."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The keys of compare.yaml."""

    runs: list[str]
    baseline: str
    metric: str
    at: At
    folder: Path | None
    reports: bool


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain types, for compare.json; a run is its name, its folder and its seed."""
    groups = {
        label: [{"name": run.name, "folder": str(run.folder), "seed": run.seed} for run in runs]
        for label, runs in comparison.groups.items()
    }
    return {
        "baseline": comparison.baseline,
        "groups": groups,
        "metrics": [asdict(metric) for metric in comparison.metrics],
        "loss": comparison.loss,
        "reach": [asdict(reach) for reach in comparison.reach],
        "notes": comparison.notes,
    }
