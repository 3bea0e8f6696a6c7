"""Expansion of the arguments of a sweep into jobs. There is one job for each combination of values."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
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

from wmtp.config.overrides import chosen_folder, expand_argument, expand_group_choice, is_dry_run, to_hydra_override
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, ConfigIssue, build, node_issues, to_plain
from wmtp.field_types import Positive

SWEEP_KEYS = ("dry_run", "sweep.", "hydra.sweep", "hydra/launcher", "hydra.launcher", "hydra/sweeper")
"""Prefixes of the keys that configure the sweep itself. Overrides of these keys are not passed to the jobs."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options in the node `sweep` of train.yaml."""

    jobs: Positive = 1
    """Maximum number of jobs that run at the same time on this machine. These jobs share the cores."""
    metric: str = "val/loss"
    """Name of the metric by which the table of results is sorted."""
    at: Literal["best", "last"] = "best"
    """Model whose metric is used. `best` is the best checkpoint, `last` is the model at the end of the run."""
    arms: list[str] = field(default_factory=list)
    """Sets of overrides. Each string contains one set, which is combined with all combinations of the other values."""
    resume: Path | None = None
    """Folder of an earlier sweep whose unfinished jobs are run again."""


@dataclass(frozen=True)
class Grid:
    """The jobs and options of a sweep that the user requested on the command line."""

    jobs: list[list[str]]
    """Overrides of each job."""
    options: SweepOptions
    folder: Path | None
    """Folder that the user chose for the sweep. None means that a new folder is created."""
    launcher: dict[str, Any]
    """Config of the Hydra launcher that the user chose."""
    is_dry_run: bool
    has_job_overrides: bool
    """True if the arguments contain at least one override for the jobs, that is, a key that is not in `SWEEP_KEYS`."""


def parse_grid(command: str, arguments: Sequence[str]) -> Grid:
    """Return the sweep that the arguments of a command describe.

    Each set of overrides in `sweep.arms` is combined with all combinations of the other values. If a key is set in
    several places, the arguments take precedence over `sweep.arms`, and `sweep.arms` over `hydra.sweeper.params`.

    Raises:
        ConfigError: an argument is not an override, or Hydra cannot compose the config.
    """
    expand = partial(expand_argument, is_sweep=True)
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            given = _parse(parser, arguments)
            fixed = [to_hydra_override(str(each.input_line)) for each in given if not each.is_sweep_override()]
            config = hydra.compose(command, fixed, return_hydra_config=True)
            sweeper_params = config.hydra.sweeper.get("params") or {}
            params = _parse(parser, [expand(f"{key}={value}") for key, value in sweeper_params.items()])
            options = read_options(config)
            arms = [_parse(parser, map(expand, shlex.split(arm))) for arm in options.arms or [""]]
            grids = [BasicSweeper.split_arguments(_merge(params, arm, given), None)[0] for arm in arms]
            # the arms alternate, so that their results become available at the same rate
            in_order = [job for row in zip_longest(*grids) for job in row if job is not None]
            # expand again, because `pretrain.model=nano,micro` can be expanded only when each job has a single value
            jobs = [[expand_group_choice(each) for each in job] for job in in_order]
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        remedy = "; it needs pip install 'wmtp[slurm]'" if "submitit" in text else ""
        raise ConfigError([ConfigIssue("sweep", "", text + remedy)]) from error
    texts = [str(each.input_line) for each in given]
    return Grid(
        jobs,
        options,
        chosen_folder("hydra.sweep.dir", texts, config),
        to_plain(config.hydra.launcher),
        is_dry_run(texts),
        any(not _is_sweep_key(each) for each in given),
    )


def read_options(config: DictConfig) -> SweepOptions:
    """Return the options in the node `sweep` of a config.

    Raises:
        ConfigError: an option is unknown, or has a wrong type or value.
    """
    if issues := list(node_issues(config.sweep, "sweep")):
        raise ConfigError(issues)
    options: SweepOptions = build(config.sweep)
    return options


def _parse(parser: OverridesParser, arguments: Iterable[str]) -> list[Override]:
    overrides, issues = [], []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            issues.append(ConfigIssue(argument, "", "is not an override; write key=value, or key=value,value,…"))
            continue
        if _is_sweep_key(override) and override.is_sweep_override():
            issues.append(ConfigIssue(override.key_or_group, "", "has one value for all jobs of a sweep"))
        if override.key_or_group == "hydra.sweep.subdir":
            problem = "cannot be set: the folder of a job is in the sweep's folder, under its number"
            issues.append(ConfigIssue(override.key_or_group, "", problem))
        overrides.append(override)
    if issues:
        raise ConfigError(issues)
    return overrides


def _merge(*sources: Sequence[Override]) -> list[Override]:
    """Merge overrides for jobs. If a key occurs again, the later override replaces the earlier one at its position."""
    merged: dict[tuple[str, str | None], Override] = {}
    for each in chain(*sources):
        if not _is_sweep_key(each):
            merged[each.key_or_group, each.package] = each
    return list(merged.values())


def _is_sweep_key(override: Override) -> bool:
    return override.key_or_group.startswith(SWEEP_KEYS)
