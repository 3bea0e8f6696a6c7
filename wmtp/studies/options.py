"""The options of a study, which a file in conf/study contains, and the check of these options."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from wmtp.config.schema import ConfigIssue
from wmtp.errors import InputError
from wmtp.field_types import Positive, PositiveFloat
from wmtp.report.metrics import is_lower_better
from wmtp.report.results import BestOrLast
from wmtp.studies.space import parse_space

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
"""Name of an arm or of a preparation. It is the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the methods that a study compares."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    overrides: list[str] = field(default_factory=list)
    """Overrides of the arm's runs, in addition to those of all runs."""
    space: dict[str, str] = field(default_factory=dict)
    """Settings to search, in addition to those of all arms, in Hydra's syntax: `interval(…)`, `choice(…)`, `range(…)`.

    `tag(log, interval(…))` searches on a logarithmic scale.
    """
    updates: PositiveFloat = 1.0
    """Updates of the training as a fraction of the horizon."""
    stage_1: PositiveFloat | None = None
    """Updates of stage 1 as a fraction of the horizon. None: the arm has no stage 1, or its overrides limit it."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run that arms start from or use as a reference. It is made once, before the search."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    overrides: list[str]
    """All overrides of the run, except its folder. They may refer to earlier preparations."""
    export: bool = False
    """Whether the model is exported with `format=hf`. Then `$NAME` is the folder of the export, not of the run."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The options of a study."""

    question: str
    """The question that the study answers."""
    arms: Annotated[dict[Name, Arm], Field(min_length=2)]
    baseline: str
    """Name of the arm with which all other arms are compared."""
    overrides: list[str]
    """Overrides of all runs of arms."""
    space: dict[str, str]
    """Settings that are searched for every arm, for example the learning rate."""
    preparations: dict[Name, Preparation]
    """Runs that are made first. In the overrides of arms, `$NAME` is the folder of a preparation."""
    metric: str
    """Primary metric, by which the search selects settings and which the verdicts are about."""
    at: BestOrLast
    delta: PositiveFloat | None
    """Largest difference in the primary metric that does not matter: δ of "the same within δ"."""
    effect: PositiveFloat
    """Difference in the primary metric that the study must be able to show."""
    deviation: PositiveFloat
    """Expected standard deviation of the differences between runs with the same seed. Only used to plan the seeds."""
    horizons: Annotated[list[Positive], Field(min_length=1)]
    """Numbers of updates of the judged runs. Each has its own schedule; verdicts are about the longest."""
    tuning_horizon: Positive
    """Number of updates of the runs of the search."""
    trials: Positive
    """Number of settings that are tried for every arm."""
    sampler: Literal["random", "tpe"]
    """Optuna's sampler of the settings."""
    search_seed: Seed
    tuning_seeds: Annotated[list[Seed], Field(min_length=1)]
    judging_seeds: Annotated[list[Seed], Field(min_length=2)]
    """Seeds of the judged runs in the order in which they are used. Their number is the maximum number of seeds."""
    min_seeds: Annotated[int, Field(ge=2)]
    """Number of seeds before the first look at the results. After that, there is a look after every seed."""
    variance_runs: Annotated[int, Field(ge=0)]
    """Runs of the baseline for each source of variance: initialization, order of the data, and choice of the data."""

    @property
    def others(self) -> list[str]:
        """Names of the arms that are compared with the baseline."""
        return [label for label in self.arms if label != self.baseline]

    @property
    def looks(self) -> tuple[int, ...]:
        """Number of judged seeds at each planned look at the results."""
        return tuple(range(min(self.min_seeds, len(self.judging_seeds)), len(self.judging_seeds) + 1))

    def space_of(self, label: str) -> dict[str, str]:
        """Return the settings that are searched for an arm, with their ranges in Hydra's syntax."""
        return self.space | self.arms[label].space


def option_issues(options: StudyOptions) -> Iterator[ConfigIssue]:
    """Yield the errors in the options of a study that the types of the options do not exclude."""
    if options.baseline not in options.arms:
        problem = f"is not an arm; the arms are {', '.join(options.arms)}"
        yield ConfigIssue("study.baseline", options.baseline, problem)
    if shared := sorted(set(options.tuning_seeds) & set(options.judging_seeds)):
        problem = "must not contain tuning seeds: settings that were chosen on a seed look better on it"
        yield ConfigIssue("study.judging_seeds", ", ".join(map(str, shared)), problem)
    for key in ("tuning_seeds", "judging_seeds", "horizons"):
        values = getattr(options, key)
        if len(set(values)) < len(values):
            yield ConfigIssue(f"study.{key}", str(values), "contains a value twice")
    try:
        is_lower_better(options.metric)
    except InputError as error:
        yield ConfigIssue("study.metric", options.metric, str(error).partition(": ")[2])
    if options.min_seeds > len(options.judging_seeds):
        problem = f"there are only {len(options.judging_seeds)} judging_seeds"
        yield ConfigIssue("study.min_seeds", str(options.min_seeds), problem)
    if options.delta is not None and options.delta >= options.effect:
        problem = f"must be below study.effect={options.effect:g}: a difference cannot both matter and not matter"
        yield ConfigIssue("study.delta", f"{options.delta:g}", problem)
    for label in options.arms:
        try:
            parse_space(options.space_of(label))
        except InputError as error:
            yield ConfigIssue(f"study.arms.{label}.space", "", str(error))
    yield from _reference_issues(options)


def _reference_issues(options: StudyOptions) -> Iterator[ConfigIssue]:
    """Yield an issue for each `$NAME` in an override that is not the name of a preparation before it."""
    known = list(options.preparations)
    texts = {f"preparations.{name}": (each.overrides, known[:number])
             for number, (name, each) in enumerate(options.preparations.items())}  # fmt: skip
    texts |= {f"arms.{label}": (arm.overrides, known) for label, arm in options.arms.items()}
    texts |= {"overrides": (options.overrides, known)}
    for key, (overrides, names) in texts.items():
        for override in overrides:
            for name in Template(override).get_identifiers():
                if name not in names:
                    yield ConfigIssue(f"study.{key}", f"${name}", "is not a preparation that is made before this run")


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The keys of the config file study.yaml."""

    study: Any
    folder: Path | None
    jobs: Positive
    dry_run: bool
