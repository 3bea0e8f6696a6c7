"""Data classes for the results of a study."""

from dataclasses import dataclass, field

from wmtp.report.results import Comparison
from wmtp.statistics.best_of_n import BestOfN
from wmtp.statistics.token_factor import TokenFactor
from wmtp.statistics.variance import Component, PairingGain
from wmtp.studies.lock import StudyLock

FINAL_VERDICTS = ("better", "worse", "the same", "runs failed")
"""Verdicts that more seeds do not change."""


@dataclass(frozen=True)
class Trial:
    """One set of settings that the search tried for an arm."""

    number: int
    settings: dict[str, str]
    values: dict[int, float | None]
    """Primary metric by tuning seed; None if the run failed or has not finished."""

    @property
    def mean(self) -> float | None:
        """Mean of the values, or None if a value is missing."""
        known = [value for value in self.values.values() if value is not None]
        return sum(known) / len(known) if known and len(known) == len(self.values) else None


@dataclass(frozen=True)
class ArmSearch:
    """The search for the settings of an arm."""

    label: str
    trials: list[Trial]
    chosen: Trial | None
    """The trial with the best mean, or None if no trial has a mean."""
    best_of_n: list[BestOfN]
    """Expected best mean of n trials, for n from 1 to the number of trials that have a mean."""


@dataclass(frozen=True)
class HorizonResult:
    """The judged runs of an arm with one horizon."""

    updates: int
    """The horizon. The arm's own updates are a fraction of it."""
    tokens: float
    """Mean number of tokens over the runs, including stage 1."""
    values: dict[int, float]
    """Primary metric at the end, by seed."""


@dataclass(frozen=True)
class ArmHorizons:
    """End values of an arm at all horizons, and the tokens that it needs relative to the baseline."""

    label: str
    horizons: list[HorizonResult]
    """Results in increasing order of the horizon. Horizons without a finished run are missing."""
    factor: TokenFactor | None
    """Factor of tokens relative to the baseline. None for the baseline, and if there is only one horizon."""


@dataclass(frozen=True)
class PlannedPower:
    """The power with which the study was planned, and the deviations that were observed."""

    effect: float
    """Difference in the primary metric that the study must be able to show."""
    deviation: float
    """Standard deviation of paired differences that was assumed."""
    power: float
    """Probability of showing the effect in one arm with all judging seeds, if the assumed deviation is true."""
    equivalence_power: float | None
    """Probability of the verdict "the same" if there is no difference. None without δ."""
    num_seeds: int
    num_comparisons: int
    observed_deviations: dict[str, float] = field(default_factory=dict)
    """Standard deviation of the paired differences of each arm, as observed."""


@dataclass(frozen=True)
class StudyResult:
    """Everything that a study has found so far."""

    lock: StudyLock
    departures: list[str]
    """What differs from the lock."""
    open_arms: list[str]
    """Arms without a final verdict for which judging seeds are left. Empty: the study has ended."""
    comparison: Comparison | None
    """Comparison of the judged runs with the longest horizon. None before the baseline and an arm have such runs."""
    searches: list[ArmSearch]
    horizons: list[ArmHorizons]
    planned: PlannedPower
    pairing: dict[str, PairingGain]
    """What pairing by seed saves, for each arm that has at least three pairs."""
    variance: dict[str, Component]
    """Variance of the baseline's metric by its source. Empty unless the study has `variance_runs`."""
    num_runs: int
    """Number of finished runs of the study."""
    total_tokens: int
    """Number of tokens on which these runs were trained."""
    seconds: float
    """Sum of the times that these runs took, which run `jobs` at a time."""
