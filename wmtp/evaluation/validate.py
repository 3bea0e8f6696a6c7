"""Validation of the configs of `evaluate` and `generate`, and default values that depend on the checkpoint's run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wmtp.config.schema import CheckedConfig, ConfigError, ConfigIssue, iter_nodes, node_issues, to_plain
from wmtp.config.trust import placement_issues
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
    is_run_data = "_target_" not in chosen or all(chosen.get(key) == trained.data.get(key) for key in SOURCE_KEYS)
    inherited = trained.data if is_run_data else OmegaConf.masked_copy(trained.data, ["max_length"])
    overridden = OmegaConf.create()
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if key.startswith("data."):
            OmegaConf.update(overridden, key.removeprefix("data."), OmegaConf.select(config, key))
    config.data = OmegaConf.merge(chosen, inherited, overridden)
    return config


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
    checkpoint, checkpoint_issues = read_checkpoint(config)
    config = fill_temperature(config, OmegaConf.select(config, "evaluation.n"))
    if checkpoint is not None:
        config = fill_run_data(config, overrides, checkpoint.config)
    issues = [*_common_issues(config), *checkpoint_issues]
    invalid = {issue.key.split(".")[0] for issue in issues}
    if not invalid & {"evaluation", "generation"}:
        issues += sampling_issues(config)
    return CheckedConfig(config, issues, checkpoint)


def sampling_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if some k is greater than `n`, or if several samples are requested with temperature 0."""
    n, k = config.evaluation.n, config.evaluation.k
    ks = [k] if isinstance(k, int) else list(k)
    if too_large := [k for k in ks if k > n]:
        problem = f"set evaluation.n={max(too_large)}, or a smaller k"
        yield ConfigIssue("evaluation.k", str(ks), f"is above evaluation.n={n}; {problem}")
    if n > 1 and config.generation.temperature == 0:
        yield ConfigIssue("evaluation.n", str(n), "greedy samples are all the same; set generation.temperature above 0")


def check_generation(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Complete and check a config of the command `generate`. The `inputs` of the result are its checkpoint."""
    checkpoint, checkpoint_issues = read_checkpoint(config)
    config = fill_temperature(config, config.n)
    issues = [*_common_issues(config), *checkpoint_issues]
    if not issues and config.n > 1 and config.generation.temperature == 0:
        issues.append(
            ConfigIssue("n", str(config.n), "greedy answers are all the same; set generation.temperature above 0")
        )
    return CheckedConfig(config, issues, checkpoint)


def _common_issues(config: DictConfig) -> list[ConfigIssue]:
    """Return the issues that both commands check: those of config nodes and of the hardware."""
    issues = [*node_issues(config, ""), *placement_issues(OmegaConf.to_container(config))]
    for key, node in iter_nodes(config):
        issues += node_issues(node, key)
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
    path = Path(config.checkpoint.path)
    if not path.exists():
        problem = f"does not exist; relative paths are relative to {Path.cwd()}"
        return None, [ConfigIssue("checkpoint", str(path), problem)]
    try:
        return find_trained_checkpoint(path), []
    except ConfigError as error:
        return None, error.issues
    except InputError as error:
        return None, [ConfigIssue("checkpoint", str(path), str(error))]
