"""From what was typed to the jobs of a sweep: one for each combination of the values that were named."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from wmtp.config.overrides import forced, grouped
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, Fault, build, node_faults, plain
from wmtp.field_types import Positive

OWN = ("dry_run", "sweep.", "hydra.sweep", "hydra/launcher", "hydra.launcher", "hydra/sweeper")
"""Overrides that are the sweep's, not its jobs'."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The keys of `sweep` in train.yaml."""

    jobs: Positive = 1
    """How many run at once on this machine, and share its cores."""
    metric: str = "val/loss"
    """What the table at the end is sorted by."""
    at: Literal["best", "last"] = "best"
    """Of which model: the checkpoint with the least val/loss, or the last one."""
    arms: list[str] = field(default_factory=list)
    """Sets of overrides, each in one line, that are combined with the grid one after the other."""
    resume: Path | None = None
    """The folder of a sweep whose unfinished jobs are to be tried again."""


@dataclass(frozen=True)
class Grid:
    """A sweep as it was typed."""

    jobs: list[list[str]]
    """The overrides of each."""
    options: SweepOptions
    folder: Path | None
    """Where it is to lie; None: in a new folder."""
    launcher: dict[str, Any]
    """Hydra's choice of where jobs run, with its settings."""
    is_rehearsal: bool
    names_jobs: bool
    """Whether anything besides `sweep.…` was typed."""


def grid_of(command: str, arguments: Sequence[str]) -> Grid:
    """The sweep that these arguments of a command describe: a grid for each of `sweep.arms`.

    An experiment's `hydra.sweeper.params` come first; an arm's overrides replace them, and what is typed both.

    Raises:
        ConfigError: an argument is no override, or they compose no config.
    """
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            typed = _parsed(parser, arguments)
            fixed = [forced(str(each.input_line)) for each in typed if not each.is_sweep_override()]
            config = hydra.compose(command, fixed, return_hydra_config=True)
            named = config.hydra.sweeper.get("params") or {}
            params = _parsed(parser, [grouped(f"{key}={value}") for key, value in named.items()])
            options = options_of(config)
            arms = [_parsed(parser, [grouped(each) for each in shlex.split(arm)]) for arm in options.arms or [""]]
            grids = [BasicSweeper.split_arguments(_merged(params, arm, typed), None)[0] for arm in arms]
            beside = [job for row in zip_longest(*grids) for job in row if job is not None]  # arms grow side by side
            jobs = [[grouped(each) for each in job] for job in beside]  # plain spellings, now of single values
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        remedy = "; it needs pip install 'wmtp[slurm]'" if "submitit" in text else ""
        raise ConfigError([Fault("sweep", "", text + remedy)]) from error
    sweep_folder = [str(each.value()) for each in typed if each.key_or_group == "hydra.sweep.dir"]
    return Grid(
        jobs,
        options,
        Path(sweep_folder[-1].strip("'\"")) if sweep_folder else None,
        plain(config.hydra.launcher),
        config.get("dry_run") is True,
        any(not _is_own(each) for each in typed),
    )


def options_of(config: DictConfig) -> SweepOptions:
    """The sweep's own settings.

    Raises:
        ConfigError: one is unknown, or has a wrong type or value.
    """
    if faults := list(node_faults(config.sweep, "sweep")):
        raise ConfigError(faults)
    options: SweepOptions = build(config.sweep)
    return options


def swept(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What sets each job apart from the others, in words."""
    common = set.intersection(*(set(job) for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(each.lstrip("+") for each in job if each not in common) for job in jobs]


def _parsed(parser: OverridesParser, arguments: Sequence[str]) -> list[Override]:
    overrides, faults = [], []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            faults.append(Fault(argument, "", "is no override; write key=value, or key=value,value,…"))
            continue
        if _is_own(override) and override.is_sweep_override():
            faults.append(Fault(override.key_or_group, "", "has one value for all jobs of a sweep"))
        if override.key_or_group == "hydra.sweep.subdir":
            faults.append(Fault(override.key_or_group, "", "a job lies in the sweep's folder under its number"))
        overrides.append(override)
    if faults:
        raise ConfigError(faults)
    return overrides


def _merged(*sources: Sequence[Override]) -> list[Override]:
    """The overrides of the jobs: the last of each key, where it first stood."""
    merged: dict[tuple[str, str | None], Override] = {}
    for each in chain(*sources):
        if not _is_own(each):
            merged[each.key_or_group, each.package] = each
    return list(merged.values())


def _is_own(override: Override) -> bool:
    return override.key_or_group.startswith(OWN)
