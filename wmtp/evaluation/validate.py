"""Everything that can be wrong with the configs of evaluate and generate, and what they take from the run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp.config.schema import ConfigError, Fault, node_faults, nodes, plain
from wmtp.distributed.device import hardware_problems
from wmtp.errors import InputError
from wmtp.models.loading import find_checkpoint, identity_of, read_config

SAMPLING_TEMPERATURE = 0.8
SAME_SOURCE = ("_target_", "shape", "path")
NOT_DECIDING: dict[str, tuple[str, ...]] = {
    "data": (),
    "evaluation": ("n", "k", "limit", "workers", "sandbox"),
    "generation": ("batch_size",),
}
"""Settings that change which samples there are, or how fast they come, but none of the samples."""


def with_temperature(config: DictConfig, n: object) -> DictConfig:
    """The config with a temperature where it leaves that open: greedy for one answer, else 0.8."""
    if OmegaConf.select(config, "generation.temperature", default=0.0) is None:
        config = config.copy()
        config.generation.temperature = 0.0 if n == 1 else SAMPLING_TEMPERATURE
    return config


def with_data_of_the_run(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config with the run's context, and with all of its data where no others were chosen.

    What was typed wins. A checkpoint that is not there is left to the checks.
    """
    try:
        trained = read_config(find_checkpoint(Path(config.checkpoint.path))[1])
    except (InputError, OmegaConfBaseException):
        return config
    config = config.copy()
    OmegaConf.set_struct(config, False)
    chosen = config.get("data")
    if not isinstance(chosen, DictConfig):
        if chosen is None:
            config.data = trained.data
        return config
    same = "_target_" not in chosen or all(chosen.get(key) == trained.data.get(key) for key in SAME_SOURCE)
    inherited = trained.data if same else OmegaConf.masked_copy(trained.data, ["max_length"])
    typed = OmegaConf.create()
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if key.startswith("data."):
            OmegaConf.update(typed, key.removeprefix("data."), OmegaConf.select(config, key))
    config.data = OmegaConf.merge(chosen, inherited, typed)
    return config


def deciding(config: DictConfig, checkpoint: Path) -> dict[str, Any]:
    """All of a config that decides what samples, their costs and their verdicts are, as plain JSON."""
    content = plain(config)
    parts: dict[str, Any] = {
        name: {key: value for key, value in content[name].items() if key not in left_out}
        for name, left_out in NOT_DECIDING.items()
    }
    return {"checkpoint": identity_of(checkpoint), "is_protected": config.evaluation.sandbox != "none", **parts}


def evaluation_faults(config: DictConfig) -> list[Fault]:
    """All faults of a config of evaluate."""
    faults = _faults(config)
    unsound = {fault.key.split(".")[0] for fault in faults}
    if not unsound & {"evaluation", "generation"}:
        faults += sampling_faults(config)
    return faults


def sampling_faults(config: DictConfig) -> Iterator[Fault]:
    """Numbers of samples that make no sense together."""
    n, k = config.evaluation.n, config.evaluation.k
    ks = [k] if isinstance(k, int) else list(k)
    if too_large := [k for k in ks if k > n]:
        problem = f"pass@{max(too_large)} needs as many samples: evaluation.n={max(too_large)}, or a smaller k"
        yield Fault("evaluation.k", str(ks), f"is above evaluation.n={n}; {problem}")
    if n > 1 and config.generation.temperature == 0:
        yield Fault("evaluation.n", str(n), "greedy samples are all the same; set generation.temperature above 0")


def generation_faults(config: DictConfig) -> list[Fault]:
    """All faults of a config of generate."""
    faults = _faults(config)
    if not faults and config.n > 1 and config.generation.temperature == 0:
        faults.append(Fault("n", str(config.n), "greedy answers are all the same; set generation.temperature above 0"))
    return faults


def _faults(config: DictConfig) -> list[Fault]:
    """Faults node by node, of the hardware, and of the checkpoint as far as files and config say it."""
    faults = list(node_faults(config, ""))
    for key, node in nodes(config):
        faults += node_faults(node, key)
    unsound = {fault.key.split(".")[0] for fault in faults}
    if "hardware" not in unsound:
        hardware = config.hardware
        for name, problem in hardware_problems(hardware.device, 1, "single"):
            faults.append(Fault(f"hardware.{name}", str(hardware[name]), problem))
        if hardware.num_processes > 1:
            problem = "only training has several processes; choose another hardware, such as auto"
            faults.append(Fault("hardware.num_processes", str(hardware.num_processes), problem))
    return [*faults, *checkpoint_faults(config)]


def checkpoint_faults(config: DictConfig) -> Iterator[Fault]:
    """No checkpoint, or none that says how its model is made."""
    if OmegaConf.is_missing(config.checkpoint, "path"):
        yield Fault("checkpoint", "", "missing; name a run's folder or a checkpoint's: checkpoint=outputs/…")
        return
    path = Path(config.checkpoint.path)
    if not path.exists():
        yield Fault("checkpoint", str(path), f"nothing is there; the path is read from {Path.cwd()}")
        return
    try:
        read_config(find_checkpoint(path)[1])
    except ConfigError as error:
        yield from error.faults
    except InputError as error:
        yield Fault("checkpoint", str(path), str(error))
