"""Everything that can be wrong with a composed config, found before anything is built."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import DictConfig
from pydantic import Field

from wmtp.algorithms.base import Algorithm
from wmtp.annotations import ExistingPath
from wmtp.config import (
    CONFIG_FOLDER,
    ConfigError,
    Fault,
    Parameter,
    build,
    locate,
    node_faults,
    nodes,
    schema,
    stage_config,
)
from wmtp.early_stopping import EarlyStopping, monitor_problem
from wmtp.errors import InputError
from wmtp.plan import Plan
from wmtp.runtime.folder import ACCEPTED, read_status
from wmtp.runtime.hardware import hardware_problems
from wmtp.stages import ReferenceStage, ValueStage
from wmtp.trainer import Trainer, metric_names


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The keys of train.yaml that belong to the run, not to the trainer or its plan."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run_name: str | None
    tags: dict[str, str | int | float | bool]
    num_samples: Annotated[int, Field(ge=0)]
    resume: ExistingPath | None
    dry_run: bool
    cache_dir: Path


def config_faults(config: DictConfig, stage: object = None) -> list[Fault]:
    """All faults of a training config: first node by node, then across nodes where those are sound.

    `stage` is the class of the stage that the config is of, if it is not the training itself.
    """
    groups = {path.name: Parameter(Any, False) for path in CONFIG_FOLDER.iterdir() if path.is_dir()}
    roots = groups | schema(Plan) | schema(RunOptions)
    faults = list(node_faults(config, "", roots))
    for key, node in nodes(config):
        faults += node_faults(node, key, anything(roots | schema(Trainer)) if key == "pretrain" else None)
    faults += [
        Fault(f"{name}.{key}", "", f"unknown key; {name} has no options as it is chosen")
        for name in groups
        if config.get(name) is not None and "_target_" not in config[name]
        for key in config[name]
    ]
    unsound = {fault.key.split(".")[0] for fault in faults}
    faults += cross_faults(config, unsound, stage)
    if config.pretrain is not None and not unsound:
        known = {(fault.key, fault.problem) for fault in faults}
        stage_faults = config_faults(stage_config(config), stage=locate(str(config.pretrain["_target_"])))
        faults += [replace(f, key=f"pretrain.{f.key}") for f in stage_faults if (f.key, f.problem) not in known]
    return faults


def anything(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """The same keys with any value: what a stage changes is checked when it is merged."""
    return {name: Parameter(Any, False) for name in parameters}


def require_sound(config: DictConfig) -> None:
    """Raises `ConfigError` with all faults, if there are any."""
    if faults := config_faults(config):
        raise ConfigError(faults)


def cross_faults(config: DictConfig, unsound: set[str], stage: object) -> Iterator[Fault]:
    """What makes no sense together, or is not there; groups that are unsound in themselves are left out."""
    for group, check in (
        ("model", model_faults),
        ("data", data_faults),
        ("optimizer", optimizer_faults),
        ("hardware", hardware_faults),
        ("resume", resume_faults),
    ):
        if group not in unsound and config.get(group) is not None:
            yield from check(config)
    if stage is None and not unsound & {"algo", "data", "pretrain"}:
        yield from algorithm_faults(config)
    if not unsound & {"algo", "model", "early_stopping"}:
        yield from early_stopping_faults(config, values=stage is ValueStage or build(config.algo).needs_values)
    if not unsound & {"batch_size", "micro_batch_size"} and (config.micro_batch_size or 1) > config.batch_size:
        yield Fault("micro_batch_size", str(config.micro_batch_size), f"at most batch_size={config.batch_size}")


def model_faults(config: DictConfig) -> Iterator[Fault]:
    """Widths that do not divide."""
    model = config.model
    if "num_attention_heads" not in model:
        return
    if model.dim % (2 * model.num_attention_heads):
        problem = f"must be a multiple of 2 · model.num_attention_heads = {2 * model.num_attention_heads}"
        yield Fault("model.dim", str(model.dim), problem)
    if model.num_attention_heads % model.num_kv_heads:
        problem = f"must divide model.num_attention_heads = {model.num_attention_heads}"
        yield Fault("model.num_kv_heads", str(model.num_kv_heads), problem)


def data_faults(config: DictConfig) -> Iterator[Fault]:
    """Sampling wishes that contradict each other."""
    data = config.data
    if data.get("balance_correct") and data.get("correct_ratio") not in (None, 0.5):
        problem = f"contradicts data.correct_ratio={data.correct_ratio}; set data.correct_ratio=null"
        yield Fault("data.balance_correct", "true", problem)


def algorithm_faults(config: DictConfig) -> Iterator[Fault]:
    """A stage that the algorithm lacks or cannot use, and data that it can learn nothing from."""
    algorithm: Algorithm = build(config.algo)
    stage = None if config.pretrain is None else locate(str(config.pretrain["_target_"]))
    if algorithm.needs_reference and algorithm.reference is None and stage is not ReferenceStage:
        problem = "the algorithm needs a reference: train one with pretrain=rho1, or name one with algo.reference=PATH"
        yield Fault("pretrain", "", problem)
    if stage is ReferenceStage and not algorithm.needs_reference:
        yield Fault("pretrain", "", "trains a reference that the algorithm has no use for; set pretrain=none")
    if stage is ValueStage and not algorithm.needs_values and config.pretrain.get("trains") == "head":
        yield Fault("pretrain.trains", "head", "trains a value head that the algorithm has no use for")
    learns_values = algorithm.needs_values or stage is ValueStage
    if learns_values and config.data.get("correct_ratio") in (0, 1) and config.data.reward_model is None:
        problem = "gives every solution the same reward, so values have nothing to learn; choose 0.5"
        yield Fault("data.correct_ratio", str(config.data.correct_ratio), problem)


def early_stopping_faults(config: DictConfig, *, values: bool) -> Iterator[Fault]:
    """Settings that contradict each other, and a monitor that nothing measures."""
    if config.early_stopping is None:
        yield Fault("early_stopping", "null", "must be one of its options; early_stopping=none never stops")
        return
    try:
        stopping: EarlyStopping = build(config.early_stopping)
    except InputError as error:
        yield Fault("early_stopping", "", str(error))
        return
    problem = monitor_problem(stopping.monitor, metric_names(config.model.num_heads, values=values))
    if stopping.patience is not None and problem:
        yield Fault("early_stopping.monitor", stopping.monitor, problem)


def optimizer_faults(config: DictConfig) -> Iterator[Fault]:
    """Whatever torch's own constructor refuses, tried on a parameter of one number."""
    options = {name: value for name, value in config.optimizer.items() if name != "_target_"}
    try:
        locate(config.optimizer["_target_"])([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ValueError, TypeError, RuntimeError) as error:
        yield Fault("optimizer", config.optimizer["_target_"], str(error))


def hardware_faults(config: DictConfig) -> Iterator[Fault]:
    """Hardware that is not there."""
    hardware = config.hardware
    for key, problem in hardware_problems(hardware.device, hardware.num_processes, hardware.strategy):
        yield Fault(f"hardware.{key}", str(hardware[key]), problem)


def resume_faults(config: DictConfig) -> Iterator[Fault]:
    """A folder that is no run's, or whose run is still going."""
    try:
        problem = resume_problem(Path(config.resume))
    except InputError as error:
        problem = str(error)
    if problem:
        yield Fault("resume", str(config.resume), problem)


def resume_problem(folder: Path) -> str | None:
    """Why a run cannot be resumed from a folder; None if it can."""
    if not (folder / ACCEPTED).exists():
        return f"is no run's folder: it has no {ACCEPTED}"
    if not any(any(folder.glob(f"{stage}checkpoints/step_*/manifest.json")) for stage in ("", "pretrain/")):
        return "the run has no checkpoint; start it anew"
    try:
        status = read_status(folder)
    except (OSError, json.JSONDecodeError):
        return None  # it died before its status was written; the checkpoints decide
    if status["state"] == "RUNNING" and status["pid"] != os.getpid() and _is_alive(status["pid"]):
        return f"the run is still going, as process {status['pid']}"
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
