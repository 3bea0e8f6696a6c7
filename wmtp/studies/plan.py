"""The runs of a study. Their folders and overrides follow from the options, so they can be listed at any time."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

from wmtp.config.overrides import quote
from wmtp.studies.options import StudyOptions

PREPARATIONS, TUNING, JUDGING, VARIANCE = "preparations", "tuning", "judging", "variance"
"""Names of the folders in the folder of a study that contain the runs of each phase."""
EXPORT = "export"
MANY_EPOCHS = 1_000_000
"""Number of epochs that no run reaches, so that only `max_steps` limits its updates."""
SOURCES = {"initialization": "seed", "order of the data": "order_seed", "choice of the data": "data.seed"}
"""Sources of the variance of a metric, and the config key that changes only this source."""


@dataclass(frozen=True)
class StudyJob:
    """One command of a study: a run of training, or the export of a preparation."""

    folder: Path
    """Folder that the command creates."""
    overrides: list[str]
    """Arguments of the command, without its folder."""
    command: Literal["train", "export"] = "train"

    @property
    def arguments(self) -> list[str]:
        """All arguments of the command."""
        key = "hydra.run.dir" if self.command == "train" else "folder"
        return [*self.overrides, f"{key}={quote(self.folder)}"]


def has_failed(status: Mapping[str, Any]) -> bool:
    """Return whether the status of a run says that it failed by itself, so that it would fail again.

    Other exit codes mean that it was interrupted, or that the machine lacks something.
    """
    return status.get("state") == "FAILED" and int(status.get("exit_code") or 1) == 1


class Plan:
    """All runs of a study in a folder."""

    def __init__(self, options: StudyOptions, folder: Path) -> None:
        self.options, self.folder = options, folder

    def preparations(self) -> Iterator[StudyJob]:
        """Yield the jobs of the preparations, in the order in which they must run."""
        for name, each in self.options.preparations.items():
            run = self.folder / PREPARATIONS / name
            yield StudyJob(run, self._with_paths(each.overrides))
            if each.export:
                # the last model, because the best one depends on how often the run validates
                yield StudyJob(run / EXPORT, [f"checkpoint={quote(run)}", "format=hf"], "export")

    def trial_folder(self, label: str, number: int) -> Path:
        """Return the folder of a trial of an arm, which contains a run for each tuning seed."""
        return self.folder / TUNING / label / f"trial-{number}"

    def trial(self, label: str, number: int, settings: Mapping[str, object]) -> list[StudyJob]:
        """Return the runs of a trial, one for each tuning seed."""
        folder, updates = self.trial_folder(label, number), self.options.tuning_horizon
        return [
            StudyJob(folder / f"seed-{seed}", self._overrides(label, settings, updates, seed))
            for seed in self.options.tuning_seeds
        ]

    def judged_folder(self, label: str, updates: int) -> Path:
        """Return the folder of the judged runs of an arm with a horizon, which contains a run for each seed."""
        return self.folder / JUDGING / label / f"updates-{updates}"

    def limits(self, label: str, updates: int) -> dict[str, int]:
        """Return the config keys that limit the updates of a run of an arm with a horizon, with their values."""
        arm = self.options.arms[label]
        found = {"max_steps": max(1, round(updates * arm.updates))}
        if arm.stage_1 is not None:
            found["pretrain.max_steps"] = max(1, round(updates * arm.stage_1))
        return found

    def judged(self, label: str, settings: Mapping[str, object], seed: int) -> list[StudyJob]:
        """Return the judged runs of an arm with one seed, one for each horizon."""
        return [
            StudyJob(self.judged_folder(label, updates) / f"seed-{seed}",
                     self._overrides(label, settings, updates, seed))
            for updates in sorted(self.options.horizons, reverse=True)
        ]  # fmt: skip

    def variance(self, settings: Mapping[str, object]) -> Iterator[StudyJob]:
        """Yield runs of the baseline that differ from its first judged run in one source of variance each."""
        updates, seed = max(self.options.horizons), self.options.judging_seeds[0]
        for source, key in SOURCES.items():
            for number in range(self.options.variance_runs):
                overrides = self._overrides(self.options.baseline, settings, updates, seed)
                own = [f"order_seed={seed}", f"{key}={seed + 1_000 + number}"]  # order_seed follows seed by default
                folder = self.folder / VARIANCE / source.replace(" ", "-") / str(number)
                yield StudyJob(folder, [*overrides, *own])

    def arm_overrides(self, label: str) -> list[str]:
        """Return the overrides of all runs of an arm, without searched settings, the horizon and the seed."""
        return self._with_paths([*self.options.overrides, *self.options.arms[label].overrides])

    def _overrides(self, label: str, settings: Mapping[str, object], updates: int, seed: int) -> list[str]:
        limits = [f"{key}={number}" for key, number in self.limits(label, updates).items()]
        for stage in ("", "pretrain.") if self.options.arms[label].stage_1 is not None else ("",):
            limits += [f"{stage}num_epochs={MANY_EPOCHS}", f"{stage}early_stopping=none"]
        searched = [f"{key}={format_setting(value)}" for key, value in settings.items()]
        return [*self.arm_overrides(label), *searched, *limits, f"seed={seed}"]

    def _with_paths(self, overrides: list[str]) -> list[str]:
        """Return overrides in which `$NAME` is replaced with the folder of the preparation NAME."""
        paths = {
            name: str((self.folder / PREPARATIONS / name / (EXPORT if each.export else "")).absolute())
            for name, each in self.options.preparations.items()
        }
        return [Template(override).safe_substitute(paths) for override in overrides]


def format_setting(value: object) -> str:
    """Return a searched value as the value of an override.

    >>> format_setting(0.00123), format_setting(True), format_setting(None)
    ('0.00123', 'true', 'null')
    """
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_settings(settings: Mapping[str, object]) -> str:
    """Return settings as text for tables, with three significant digits.

    >>> describe_settings({"optimizer.lr": 0.0031234, "algo.beta": 1})
    'optimizer.lr=0.00312 algo.beta=1'
    """
    parts = [f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()]
    return shlex.join(parts) if parts else "none"
