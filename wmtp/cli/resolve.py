"""From the arguments of a command to a checked job."""

import copy
import os
import tempfile
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from wmtp.cli.command import Command
from wmtp.config.groups import group_options, is_group
from wmtp.config.overrides import (
    RUN_DIR,
    chosen_folder,
    chosen_run_dir,
    load_saved_overrides,
    override_key,
    parse_overrides,
    quote,
    resumed_folder,
    to_hydra_override,
)
from wmtp.config.paths import absolute_paths, started_in
from wmtp.config.presets import drop_preset_values
from wmtp.config.schema import CONFIG_FOLDER, CheckedConfig, ConfigError, ConfigIssue, did_you_mean
from wmtp.config.trust import KEY_REFERENCE, unconfirmed_issues
from wmtp.errors import InputError
from wmtp.runtime.run_dir import OUTPUTS
from wmtp.runtime.writable import require_writable


@dataclass(frozen=True)
class ComposedJob:
    """A checked config, with the overrides from which it was composed and with Hydra's settings."""

    checked: CheckedConfig
    overrides: list[str]
    """Overrides in Hydra's syntax from which the config was composed, including those of Hydra's own settings."""
    hydra: DictConfig
    """The composed config with the node `hydra`, which contains Hydra's own settings."""
    notes: list[str] = field(default_factory=list)
    """Messages about values of the preset that are not used."""


@dataclass(frozen=True)
class ResolvedJob:
    """A job with everything that its arguments determine: the checked config, Hydra's settings, and the folder."""

    composed: ComposedJob
    folder: Path
    is_temporary: bool
    """True if the folder is removed at the end of the job."""

    @property
    def planned_folder(self) -> Path:
        """The folder of the job. Instead of the temporary folder of a dry run, it is one that a run would have."""
        if not self.is_temporary:
            return self.folder
        return (chosen_run_dir(self.composed.overrides) or OUTPUTS / self.folder.name).absolute()


def resolve(command: Command, arguments: list[str]) -> ResolvedJob:
    """Compose and check the config of a command, and choose the folder. The checks read what the job needs.

    Raises:
        ConfigError: the arguments contain errors or describe a sweep, or the folder cannot be used.
    """
    job = compose(command, arguments)
    config = job.checked.config
    values = (OmegaConf.select(job.hydra, "hydra.sweeper.params"), OmegaConf.select(config, "sweep.arms"))
    if any(values) and config.get("resume") is None:  # a job of a sweep is resumed alone
        problem = "is missing: these settings describe a sweep (a preset of experiment=sweep/…, or sweep.arms)"
        raise ConfigError([*job.checked.issues, ConfigIssue("-m", "", problem)])
    return choose_folder(command, job)


def choose_folder(command: Command, job: ComposedJob) -> ResolvedJob:
    """Choose the folder of a job whose config is valid. If the command needs no folder, create a temporary one.

    Raises:
        ConfigError: the config has issues, or the folder cannot be used.
        InputError: no files can be written to the folder or to the cache.
    """
    if job.checked.issues:
        raise ConfigError(job.checked.issues)
    if "cache_dir" in job.checked.config:
        require_writable(Path(job.checked.config.cache_dir), "cache_dir")
    named = command.folder(job.checked, job.overrides)
    try:
        folder = Path(os.path.abspath(named or tempfile.mkdtemp(prefix=f"wmtp-{command.name}-")))
    except OSError as error:
        problem = "no temporary folder can be created"
        raise InputError(f"{problem}: {error.strerror}; choose another place with the variable TMPDIR") from error
    if job.checked.config.get("dry_run") and "cache_dir" in job.checked.config:
        job.checked.config.cache_dir = str(folder / "cache")
    with open_dict(job.hydra):
        job.hydra.hydra.run.dir = str(folder)
    return ResolvedJob(job, folder, named is None)


def compose(
    command: Command, arguments: list[str], source: Path | None = None, typed: Sequence[str] | None = None
) -> ComposedJob:
    """Compose and check the config of a command. The result contains all issues of the arguments.

    Args:
        command: the command.
        arguments: the arguments of the command.
        source: the folder from which the arguments were read, if the user has not typed them. If a run is resumed, its
            folder is used in the same way.
        typed: the arguments that the user has typed. By default, the user has typed all arguments.

    Raises:
        ConfigError: Hydra cannot compose the config, for example because of an unknown key.
    """
    issues: list[ConfigIssue] = []
    saved = load_saved_overrides(arguments)
    overrides = merge_overrides(saved + arguments, issues)
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), command.name, version_base="1.3"):
            composed = hydra.compose(command.name, overrides, return_hydra_config=True)
            if (run_dir := chosen_folder(RUN_DIR, overrides, composed)) is not None:
                overrides = [f"{RUN_DIR}={quote(run_dir)}" if o.startswith(f"{RUN_DIR}=") else o for o in overrides]
            notes = drop_preset_values(command.name, overrides, composed)
        resumed = resumed_folder(arguments)
        typed_keys = {override_key(each) for each in arguments} if source is None else {"resume"}
        overrides = make_paths_absolute(composed, overrides, typed_keys, resumed or source)
        checked = command.check(without_hydra(composed), overrides)
        if (source := source or resumed) is not None:
            issues += unconfirmed_issues(checked.config, arguments if typed is None else typed, source)
        if not checked.issues:
            overrides = resolve_overrides(overrides, checked.config)
            composed.hydra.overrides.task = resolve_overrides(_task_overrides(composed), checked.config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*issues, ConfigIssue("config", "", " ".join(str(error).split()))]) from error
    return ComposedJob(replace(checked, issues=[*issues, *checked.issues]), overrides, composed, notes)


def make_paths_absolute(
    composed: DictConfig, overrides: list[str], typed: Collection[str], source: Path | None
) -> list[str]:
    """Make the input paths in a composed config absolute, and return the overrides from which it is composed then.

    A relative path that was typed starts at the current folder. The others start at the folder in which `source`, the
    run or sweep that is resumed, was started.

    Args:
        composed: the composed config with Hydra's settings. It is changed.
        overrides: the overrides from which it was composed.
        typed: keys that the user has typed.
        source: the folder of the run or sweep that is resumed. None if there is none.
    """
    start = (source and started_in(source)) or Path.cwd()
    found = absolute_paths(composed, lambda key: Path.cwd() if key in typed else start)
    for key, path in found.items():
        OmegaConf.update(composed, key, str(path))
    added = [f"++{key}={quote(path)}" for key, path in found.items()]
    task = _task_overrides(composed)
    composed.hydra.overrides.task = [*(o for o in task if override_key(o) not in found), *added]
    return [*(o for o in overrides if override_key(o) not in found), *added]


def resolve_overrides(overrides: list[str], config: DictConfig) -> list[str]:
    """Return overrides in which the values of a checked config replace interpolations that read the environment.

    Therefore a run that is resumed has the same values as before. Only interpolations that are the value of a key are
    replaced, not those in lists and dictionaries.
    """
    resolved = []
    for override in overrides:
        key = override_key(override)
        value = OmegaConf.select(config, key) if "${" in KEY_REFERENCE.sub("", override) else None
        if isinstance(value, str | int | float) and "${" not in str(value):  # as text, it would be an interpolation
            override = f"++{key}={quote(value) if isinstance(value, str) else value}"
        resolved.append(override)
    return resolved


def _task_overrides(composed: DictConfig) -> list[str]:
    """Return the overrides that Hydra records, with their interpolations."""
    return typing.cast(list[str], OmegaConf.to_container(composed.hydra.overrides.task))


def merge_overrides(arguments: list[str], issues: list[ConfigIssue]) -> list[str]:
    """Convert arguments to overrides in Hydra's syntax. If a key is set several times, the last value remains.

    An issue is appended to `issues` for each argument that is not an override or that chooses an unknown option.
    """
    overrides: dict[tuple[str, str | None], str] = {}
    for override in parse_overrides(arguments, issues):
        key = override.key_or_group
        options = group_options(key) if is_group(key) else None
        if options is not None and str(override.value()) not in options:
            choice = str(override.value())
            issues.append(ConfigIssue(key, choice, f"no such option; {did_you_mean(choice, options)}"))
        else:
            overrides[key, override.package] = to_hydra_override(override.input_line or "")
    return list(overrides.values())


def encode_job(job: ComposedJob) -> dict[str, Any]:
    """Return a composed job as plain JSON values, with which another process can run it."""
    return {"overrides": job.overrides, "config": OmegaConf.to_yaml(job.hydra)}


def decode_job(command: Command, values: Mapping[str, Any]) -> ComposedJob:
    """Create a job from the values that `encode_job` returned, and check its config on this machine."""
    composed = OmegaConf.create(values["config"])
    assert isinstance(composed, DictConfig)
    settings = OmegaConf.structured(HydraConf)
    OmegaConf.set_struct(settings, False)  # groups of Hydra, such as hydra/env, add keys
    composed.hydra = OmegaConf.merge(settings, composed.hydra)
    return ComposedJob(command.check(without_hydra(composed), values["overrides"]), values["overrides"], composed)


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy of a composed config without the node `hydra`. Keys cannot be added to it."""
    config = copy.deepcopy(composed)
    OmegaConf.set_struct(config, True)
    with open_dict(config):
        del config["hydra"]
    return config
