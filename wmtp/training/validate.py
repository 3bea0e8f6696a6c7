"""Everything that can be wrong with a composed config, found before anything is built."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field

from wmtp.algorithms.base import INITIAL, Algorithm
from wmtp.config.groups import STAGE_GROUPS
from wmtp.config.schema import (
    CONFIG_FOLDER,
    Fault,
    Parameter,
    build,
    locate,
    node_faults,
    nodes,
    schema,
    stage_config,
)
from wmtp.distributed.device import hardware_problems
from wmtp.errors import InputError
from wmtp.field_types import ExistingPath
from wmtp.models.loading import compose_source
from wmtp.models.source import ModelSource
from wmtp.objectives.base import metric_names
from wmtp.runtime.run_dir import ACCEPTED, is_running
from wmtp.sandbox.isolation import Choice
from wmtp.training.early_stopping import EarlyStopping, monitor_problem
from wmtp.training.plan import Plan
from wmtp.training.stages import ReferenceStage, Stage, ValueStage
from wmtp.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The keys of train.yaml that belong to the run, not to the trainer or its plan."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run_name: str | None
    tags: dict[str, str | int | float | bool]
    num_validation_samples: Annotated[int, Field(ge=0)]
    num_samples: Annotated[int, Field(ge=0)]
    sandbox: Choice
    resume: ExistingPath | None
    resume_override: list[Literal["data", "micro_batch_size", "objective", "optimizer", "seed"]]
    dry_run: bool
    cache_dir: Path
    report: bool
    sweep: Any


NEEDED = ("algo", "model", "data", "optimizer", "scheduler", "early_stopping", "hardware", "checkpoint")
"""Groups that nothing works without."""


def config_faults(config: DictConfig, stage: Stage | None = None) -> list[Fault]:
    """All faults of a training config: first node by node, then across nodes where those are sound.

    `stage` is the stage that the config is of, if it is not the training itself.
    """
    groups = {path.name: Parameter(Any, False) for path in CONFIG_FOLDER.iterdir() if path.is_dir()}
    expected = (groups | schema(Plan) | schema(RunOptions) | schema(Trainer)).keys() - {"experiment"}
    if missing := [name for name in expected if name not in config]:
        return [Fault(name, "", "is missing; nothing can do without it") for name in missing]
    faults = list(node_faults(config, "", groups | schema(Plan) | schema(RunOptions)))
    for key, node in nodes(config):
        faults += node_faults(node, key, changeable_in_a_stage() if key == "pretrain" else None)
    for name in groups:
        faults += group_faults(name, config.get(name))
    unsound = {fault.key.split(".")[0] for fault in faults}
    faults += cross_faults(config, unsound, stage)
    if config.pretrain is not None and not unsound:
        known = {(fault.key, fault.problem) for fault in faults}
        faults += [
            replace(fault, key=f"pretrain.{fault.key}")
            for fault in config_faults(stage_config(config), build(config.pretrain))
            if (fault.key, fault.problem) not in known
        ]
    return faults


def group_faults(name: str, value: Any) -> Iterator[Fault]:
    """A group that holds no object: left out where it is needed, or a value where an option should be."""
    options = ", ".join(sorted(path.stem for path in (CONFIG_FOLDER / name).glob("*.yaml") if path.stem != "base"))
    if value is None:
        if name in NEEDED:
            yield Fault(name, "null", f"must be one of {options}")
    elif not isinstance(value, DictConfig):
        yield Fault(name, repr(value), f"must be one of {options}")
    elif "_target_" not in value:
        for key in map(str, value):
            yield Fault(f"{name}.{key}", "", f"unknown key; {name} has no options as it is chosen")


def changeable_in_a_stage() -> dict[str, Parameter]:
    """The keys of train.yaml that a stage may change, with any value: they are checked when they are merged."""
    names = [*STAGE_GROUPS, *schema(Plan), *schema(Trainer), "seed"]
    return {name: Parameter(Any, False) for name in names}


def cross_faults(config: DictConfig, unsound: set[str], stage: Stage | None) -> Iterator[Fault]:
    """What makes no sense together, or is not there; groups that are unsound in themselves are left out."""
    if "model" not in unsound and config.get("model") is not None and (problems := list(model_faults(config))):
        yield from problems
        unsound = unsound | {"model"}
    for group, check in (
        ("data", data_faults),
        ("optimizer", optimizer_faults),
        ("hardware", hardware_faults),
        ("resume", resume_faults),
    ):
        if group not in unsound and config.get(group) is not None:
            yield from check(config)
    if stage is None and not unsound & {"algo", "model", "data", "pretrain"}:
        yield from algorithm_faults(config)
    if not unsound & {"algo", "model", "early_stopping"}:
        yield from early_stopping_faults(config, stage)
    if not unsound & {"batch_size", "micro_batch_size", "hardware"}:
        yield from batch_faults(config)


def batch_faults(config: DictConfig) -> Iterator[Fault]:
    """Batches that leave a process without work."""
    batch_size, processes = config.batch_size, config.hardware.num_processes
    if batch_size < processes:
        problem = f"at least hardware.num_processes={processes}, so that each has work"
        yield Fault("batch_size", str(batch_size), problem)
    elif (config.micro_batch_size or 1) > (share := math.ceil(batch_size / processes)):
        problem = f"at most batch_size={batch_size}"
        if processes > 1:
            problem = f"at most {share}, so that each of {processes} processes has work in batch_size={batch_size}"
        yield Fault("micro_batch_size", str(config.micro_batch_size), problem)


def model_source(config: DictConfig) -> ModelSource:
    """The model's source without its tokenizer, which takes time to make.

    Raises:
        InputError: what its parts are made of is not there.
    """
    return compose_source(config.model, None, Path(config.cache_dir))


def model_faults(config: DictConfig) -> Iterator[Fault]:
    """A model that cannot be made, as far as can be told without its weights; texts that it cannot read."""
    source = model_source(config)
    problems = [Fault(f"model.{key}", value, problem) for key, value, problem in source.problems()]
    yield from problems
    limit = None if problems else source.max_positions
    length = config.data.get("max_length") if isinstance(config.data, DictConfig) else None
    if limit is not None and isinstance(length, int) and length > limit:
        yield Fault("data.max_length", str(length), f"the model reads {limit} tokens at most")


def data_faults(config: DictConfig) -> Iterator[Fault]:
    """Sampling wishes that contradict each other."""
    data = config.data
    if data.get("balance_correct") and data.get("correct_ratio") not in (None, 0.5):
        problem = f"contradicts data.correct_ratio={data.correct_ratio}; set data.correct_ratio=null"
        yield Fault("data.balance_correct", "true", problem)


def algorithm_faults(config: DictConfig) -> Iterator[Fault]:
    """A stage that the algorithm lacks or cannot use, and data or a model that it can do nothing with."""
    try:
        algorithm: Algorithm = build(config.algo)
    except InputError as error:
        yield Fault("algo", "", str(error))
        return
    stage: Stage | None = None if config.pretrain is None else build(config.pretrain)
    if algorithm.needs_reference and algorithm.reference is None and not isinstance(stage, ReferenceStage):
        problem = "the algorithm needs a reference: train one with pretrain=rho1, or name one with algo.reference=PATH"
        yield Fault("pretrain", "", problem)
    if isinstance(stage, ReferenceStage) and not algorithm.needs_reference:
        yield Fault("pretrain", "", "trains a reference that the algorithm has no use for; set pretrain=none")
    if isinstance(stage, ValueStage) and not algorithm.needs_values and stage.trains == "head":
        yield Fault("pretrain.trains", "head", "trains a value head that the algorithm has no use for")
    source = model_source(config)
    if source.num_heads < algorithm.min_heads:
        problem = f"{algorithm.name} does nothing with fewer than {algorithm.min_heads} heads"
        yield Fault("model.num_heads", str(source.num_heads), problem)
    if algorithm.reference == INITIAL and not source.is_pretrained:
        problem = "is for pretrained models: a new one knows nothing; train a reference with pretrain=rho1"
        yield Fault("algo.reference", INITIAL, problem)
    learns_values = algorithm.needs_values or isinstance(stage, ValueStage)
    if learns_values and config.data.get("correct_ratio") in (0, 1) and config.data.reward_model is None:
        problem = "gives every solution the same reward, so values have nothing to learn; choose 0.5"
        yield Fault("data.correct_ratio", str(config.data.correct_ratio), problem)
    if stage is not None:
        yield from stage_faults(config, stage)


def stage_faults(config: DictConfig, stage: Stage) -> Iterator[Fault]:
    """What the stage changes and must not, and what its loss cannot do without."""
    changed = stage_config(config)
    if not (isinstance(changed.data, DictConfig) and isinstance(changed.model, DictConfig)):
        return
    if changed.model.get("tokenizer") != config.model.get("tokenizer"):
        yield Fault("pretrain.model.tokenizer", "", "must be the training's; change model.tokenizer")
    if stage.trains_policy and changed.model != config.model:
        yield Fault("pretrain.model", "", "the training goes on with this stage's model; change model instead")
    if not isinstance(stage, ValueStage) or stage.value_loss.kind != "ranking":
        return
    if not changed.data.group_tasks:
        problem = "compares the solutions to a task, which must meet in a batch: set pretrain.data.group_tasks=true"
        yield Fault("pretrain.loss", "ranking", problem)
    micro_batch_size = changed.micro_batch_size or math.ceil(changed.batch_size / config.hardware.num_processes)
    if micro_batch_size % 2 or changed.batch_size % 2:
        yield Fault("pretrain.loss", "ranking", "needs an even batch_size and micro_batch_size, to hold pairs")
    if changed.data.reward_model is not None:
        yield Fault("pretrain.loss", "ranking", "ranks by is_correct, not by data.reward_model; choose loss=reward")


def early_stopping_faults(config: DictConfig, stage: Stage | None) -> Iterator[Fault]:
    """Settings that contradict each other, and a monitor that nothing measures."""
    try:
        stopping: EarlyStopping = build(config.early_stopping)
    except InputError as error:
        yield Fault("early_stopping", "", str(error))
        return
    num_heads, values = model_source(config).num_heads, needs_values(config)
    names = metric_names(num_heads, values=values) if stage is None else stage.metric_names(num_heads)
    problem = monitor_problem(stopping.monitor, names)
    if stopping.patience is not None and problem:
        yield Fault("early_stopping.monitor", stopping.monitor, problem)


def needs_values(config: DictConfig) -> bool:
    """Whether the algorithm trains a value head; its class knows, or that of the algorithm it wraps."""
    node = config.algo
    while "of" in node:
        node = node.of
    return bool(getattr(locate(str(node["_target_"])), "needs_values", False))


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
    return "the run is still going" if is_running(folder) else None
