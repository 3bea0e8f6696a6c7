"""Validation of the configs of `evaluate` and `generate`, and default values that depend on the checkpoint's run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wmtp.config.overrides import override_key, typed_values
from wmtp.config.schema import (
    CheckedConfig,
    ConfigError,
    ConfigIssue,
    is_node,
    iter_nodes,
    node_issues,
    schema,
    to_plain,
)
from wmtp.config.trust import placement_issues
from wmtp.data.sources import DataSource
from wmtp.distributed.device import hardware_issues
from wmtp.errors import InputError
from wmtp.models.loading import TrainedCheckpoint, find_trained_checkpoint

SAMPLING_TEMPERATURE = 0.8
"""Default temperature if several samples are generated for each prompt."""
SOURCE_KEYS = ("_target_", "shape", "path")
"""Keys of a data config that determine which data set is read."""
NON_IDENTITY_KEYS: dict[str, tuple[str, ...]] = {
    "data": (),
    "evaluation": ("n", "k", "limit", "workers", "sandbox"),
    "generation": ("batch_size",),
}
"""For each config group, the keys that change only the number of samples or the speed. They do not change the content
or the verdict of any sample."""


def fill_temperature(config: DictConfig, n: object) -> DictConfig:
    """Return the config with a default temperature if its temperature is null.

    The default is 0 (greedy decoding) if the number of samples `n` is 1, and 0.8 otherwise.
    """
    if OmegaConf.select(config, "generation.temperature", default=0.0) is None:
        config = config.copy()
        config.generation.temperature = 0.0 if n == 1 else SAMPLING_TEMPERATURE
    return config


def fill_run_data(config: DictConfig, overrides: list[str], trained: DictConfig) -> DictConfig:
    """Return the config with data settings of the run that trained the checkpoint.

    If the config names no data set, or the same data set as the run, the config gets all data settings of the run. If
    the config names another data set, it gets only the run's `max_length`. Settings in `overrides`, which come from the
    command line, have precedence. `trained` is the config of the run.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    chosen = config.get("data")
    if not isinstance(chosen, DictConfig):
        if chosen is None:
            config.data = trained.data
        return config
    is_run_data = "_target_" not in chosen or all(
        chosen.get(key) == trained.data.get(key) or (key == "path" and _is_same_path(chosen, trained.data))
        for key in SOURCE_KEYS
    )
    inherited = trained.data if is_run_data else OmegaConf.masked_copy(trained.data, ["max_length"])
    overridden = OmegaConf.create()
    for override in overrides:
        key = override_key(override)
        if key.startswith("data."):
            OmegaConf.update(overridden, key.removeprefix("data."), OmegaConf.select(config, key))
    config.data = OmegaConf.merge(chosen, inherited, overridden)
    return config


def _is_same_path(one: DictConfig, other: DictConfig) -> bool:
    """Return whether the paths of two data configs name the same file or folder."""
    paths = [data.get("path") for data in (one, other) if not OmegaConf.is_missing(data, "path")]
    return len(paths) == 2 and None not in paths and Path(paths[0]).resolve() == Path(paths[1]).resolve()


def names_data(overrides: list[str]) -> bool:
    """Return whether overrides choose the records of an evaluation, so that they need not be those of the run."""
    neutral = schema(DataSource).keys() - {"seed"}
    keys = {override_key(override) for override in overrides}
    return any(key == "data" or (key.startswith("data.") and key.split(".")[1] not in neutral) for key in keys)


def evaluation_identity(config: DictConfig, checkpoint: TrainedCheckpoint) -> dict[str, Any]:
    """Return all settings that determine the samples, their statistics and their verdicts, as plain JSON values."""
    content = to_plain(config)
    parts: dict[str, Any] = {
        name: {key: value for key, value in content[name].items() if key not in excluded}
        for name, excluded in NON_IDENTITY_KEYS.items()
    }
    return {"checkpoint": checkpoint.fingerprint, "is_protected": config.evaluation.sandbox != "none", **parts}


def check_evaluation(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Complete and check a config of the command `evaluate`. The `inputs` of the result are its checkpoint."""
    typed = typed_values(overrides)
    issues = list(node_issues(config, "", typed=typed))
    checkpoint, checkpoint_issues = read_checkpoint(config)
    for key in ("data", "evaluation"):
        if is_node(config.get(key)):
            list(node_issues(config[key], key, typed=typed))  # converts the values; the issues are found again below
    config = fill_temperature(config, OmegaConf.select(config, "evaluation.n"))
    if checkpoint is not None:
        config = fill_run_data(config, overrides, checkpoint.config)
    issues += [*_common_issues(config, typed), *checkpoint_issues]
    invalid = {issue.key.split(".")[0] for issue in issues}
    if not invalid & {"evaluation", "generation"}:
        issues += sampling_issues(config)
    return CheckedConfig(config, issues, checkpoint)


def sampling_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if some k is greater than `n`, or if several samples are requested with temperature 0."""
    n, k = config.evaluation.n, config.evaluation.k
    if too_large := [each for each in k if each > n]:
        problem = f"set evaluation.n={max(too_large)}, or a smaller k"
        yield ConfigIssue("evaluation.k", str(k), f"is above evaluation.n={n}; {problem}")
    if n > 1 and config.generation.temperature == 0:
        yield ConfigIssue("evaluation.n", str(n), "greedy samples are all the same; set generation.temperature above 0")


def check_generation(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Complete and check a config of the command `generate`. The `inputs` of the result are its checkpoint."""
    typed = typed_values(overrides)
    issues = list(node_issues(config, "", typed=typed))
    checkpoint, checkpoint_issues = read_checkpoint(config)
    config = fill_temperature(config, config.n)
    issues += [*_common_issues(config, typed), *checkpoint_issues]
    if not issues and config.n > 1 and config.generation.temperature == 0:
        problem = "greedy answers are all the same; set generation.temperature above 0"
        issues.append(ConfigIssue("n", str(config.n), problem))
    return CheckedConfig(config, issues, checkpoint)


def _common_issues(config: DictConfig, typed: Mapping[str, str]) -> list[ConfigIssue]:
    """Return the issues that both commands check: those of the nodes inside the config, and of the hardware."""
    issues = list(placement_issues(OmegaConf.to_container(config)))
    for key, node in iter_nodes(config):
        issues += node_issues(node, key, typed=typed)
    invalid = {issue.key.split(".")[0] for issue in issues}
    if "hardware" not in invalid:
        hardware = config.hardware
        for name, problem in hardware_issues(hardware.device, 1, "single"):
            issues.append(ConfigIssue(f"hardware.{name}", str(hardware[name]), problem))
        if hardware.num_processes > 1:
            problem = "only training can use several processes; choose another hardware, such as auto"
            issues.append(ConfigIssue("hardware.num_processes", str(hardware.num_processes), problem))
    return issues


def read_checkpoint(config: DictConfig) -> tuple[TrainedCheckpoint | None, list[ConfigIssue]]:
    """Find and verify the checkpoint that a config names, and read the config of its run.

    Returns:
        The checkpoint, or None if there is none that can be used; and the issues that explain why.
    """
    if OmegaConf.is_missing(config.checkpoint, "path"):
        problem = "missing; set it to the folder of a run or of a checkpoint: checkpoint=outputs/…"
        return None, [ConfigIssue("checkpoint", "", problem)]
    if not isinstance(config.checkpoint.path, str):
        problem = "must be the folder of a run or of a checkpoint"
        return None, [ConfigIssue("checkpoint", str(config.checkpoint.path), problem)]
    path = Path(config.checkpoint.path)
    if not path.exists():
        problem = f"does not exist; relative paths are relative to {Path.cwd()}"
        return None, [ConfigIssue("checkpoint", str(path), problem)]
    path = path.absolute()
    config.checkpoint.path = str(path)
    try:
        return find_trained_checkpoint(path), []
    except ConfigError as error:
        return None, error.issues
    except InputError as error:
        return None, [ConfigIssue("checkpoint", str(path), str(error))]
