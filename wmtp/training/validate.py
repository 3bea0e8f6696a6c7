"""Checks of a complete training config that run before any object of the run is built."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from wmtp.algorithms.base import Algorithm
from wmtp.config.groups import STAGE_GROUPS, run_groups
from wmtp.config.schema import (
    CONFIG_FOLDER,
    NOTHING_TYPED,
    CheckedConfig,
    ConfigIssue,
    Parameter,
    build,
    copy_values,
    iter_nodes,
    node_issues,
    schema,
    stage_config,
    stage_keys,
)
from wmtp.config.targets import locate
from wmtp.config.trust import placement_issues
from wmtp.distributed.device import hardware_issues, missing_hardware
from wmtp.errors import InputError
from wmtp.evaluation.in_training import sample_metric_names
from wmtp.field_types import ExistingPath, OutputPath
from wmtp.models.loading import build_source
from wmtp.models.source import ModelSource
from wmtp.objectives.base import metric_names
from wmtp.runtime.processes import started_together
from wmtp.sandbox.isolation import Choice
from wmtp.training.algorithm_checks import algorithm_issues
from wmtp.training.early_stopping import EarlyStopping, monitor_problem
from wmtp.training.optim import try_optimizer, try_scheduler
from wmtp.training.plan import Plan
from wmtp.training.resume_check import resume_issues
from wmtp.training.stages import Stage
from wmtp.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The keys of train.yaml that are options of the whole run, not of the trainer or of its plan."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    order_seed: Annotated[int, Field(ge=0, lt=2**63)]
    run_name: str | None
    tags: dict[str, str | int | float | bool]
    num_validation_samples: Annotated[int, Field(ge=0)]
    num_validation_attempts: Annotated[int, Field(ge=0)]
    num_samples: Annotated[int, Field(ge=0)]
    sandbox: Choice
    resume: ExistingPath | None
    resume_override: list[Literal["data", "micro_batch_size", "objective", "optimizer", "seed"]]
    dry_run: bool
    cache_dir: OutputPath
    report: bool
    sweep: Any
    objective: Any


REQUIRED_GROUPS = ("algo", "model", "data", "optimizer", "scheduler", "early_stopping", "hardware", "checkpoint")
"""Names of the config groups that must not be null."""


def check_training(
    config: DictConfig, typed: Mapping[str, str] = NOTHING_TYPED, stage: Stage | None = None
) -> CheckedConfig:
    """Check a training config and convert its values. The `inputs` of the result are the algorithm, built to check it.

    Issues within one config group come first. Contradictions between groups come next, but a group that has issues of
    its own is not checked for contradictions. The issues of the config of stage 1 come last.

    Args:
        config: the composed config.
        typed: values as the user typed them, by dotted key.
        stage: stage 1, if `config` is the config of stage 1; None, if `config` is the config of the run.
    """
    groups = {name: Parameter(Any, False) for name in run_groups()}
    expected = (groups | schema(Plan) | schema(RunOptions) | schema(Trainer)).keys() - {"experiment"}
    if missing := [name for name in expected if name not in config]:
        return CheckedConfig(config, [ConfigIssue(name, "", "is missing, but required") for name in missing])
    issues = list(node_issues(config, "", groups | schema(Plan) | schema(RunOptions), typed))
    issues += placement_issues(OmegaConf.to_container(config))
    for key, node in iter_nodes(config):
        issues += node_issues(node, key, stage_overridable_keys() if key == "pretrain" else None, typed)
    for name in groups:
        issues += group_issues(name, config.get(name))
    invalid = {issue.key.split(".")[0] for issue in issues}
    algorithm: Algorithm | None = None
    if stage is None and "algo" not in invalid:
        try:
            algorithm = build(config.algo)
        except InputError as error:
            issues.append(ConfigIssue("algo", "", str(error)))
    issues += cross_issues(config, invalid, stage, algorithm)
    if config.pretrain is not None and not invalid:
        known = {(issue.key, issue.problem) for issue in issues}
        stage_typed = {key.removeprefix("pretrain."): text for key, text in typed.items()}
        checked = check_training(stage_config(config), stage_typed, build(config.pretrain))
        issues += [
            replace(issue, key=f"pretrain.{issue.key}")
            for issue in checked.issues
            if (issue.key, issue.problem) not in known
        ]
        copy_values(checked.config, config.pretrain, stage_keys(config))
    return CheckedConfig(config, list(dict.fromkeys(issues)), algorithm)


def group_issues(name: str, value: Any) -> Iterator[ConfigIssue]:
    """Yield the issues of a config group that names no class, which means that it has no key `_target_`.

    The value of a required group must not be null. If a group is not null, its value must be a dictionary. If this
    dictionary has no key `_target_`, it must be empty.
    """
    options = ", ".join(sorted(path.stem for path in (CONFIG_FOLDER / name).glob("*.yaml") if path.stem != "base"))
    if value is None:
        if name in REQUIRED_GROUPS:
            yield ConfigIssue(name, "null", f"must be one of {options}")
    elif not isinstance(value, DictConfig):
        yield ConfigIssue(name, repr(value), f"must be one of {options}")
    elif "_target_" not in value:
        for key in map(str, value):
            yield ConfigIssue(f"{name}.{key}", "", f"unknown key; the chosen {name} has no options")


def stage_overridable_keys() -> dict[str, Parameter]:
    """Return the keys of train.yaml that stage 1 may override.

    Here the type of every key is `Any`, because the values are checked later, in the complete config of stage 1.
    """
    names = [*STAGE_GROUPS, *schema(Plan), *schema(Trainer), "seed", "order_seed"]
    return {name: Parameter(Any, False) for name in names}


def cross_issues(
    config: DictConfig, invalid: set[str], stage: Stage | None, algorithm: Algorithm | None
) -> Iterator[ConfigIssue]:
    """Yield issues that concern more than one setting, options that a class rejects, and missing files or hardware.

    `invalid` contains the keys that already have issues. A check that needs one of these keys is skipped.
    """
    if "model" not in invalid and config.get("model") is not None and (found_issues := list(model_issues(config))):
        yield from found_issues
        invalid = invalid | {"model"}
    for group, check in (
        ("data", data_issues),
        ("hardware", hardware_group_issues),
        ("resume", resume_issues),
    ):
        if group not in invalid and config.get(group) is not None:
            yield from check(config)
    if not invalid & {"optimizer", "scheduler"}:
        yield from optimizer_issues(config)
    if algorithm is not None and not invalid & {"model", "data", "pretrain"}:
        yield from algorithm_issues(config, algorithm, model_source(config))
    if not invalid & {"algo", "model", "early_stopping", "num_validation_samples", "num_validation_attempts"}:
        yield from early_stopping_issues(config, stage)
    if not invalid & {"batch_size", "micro_batch_size", "hardware"}:
        yield from batch_issues(config)
    if stage is None and not invalid & {"num_validation_samples", "num_validation_attempts"}:
        yield from attempt_issues(config)


def attempt_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if attempts are requested, but no validation problem to attempt."""
    if config.num_validation_attempts and not config.num_validation_samples:
        problem = (
            "attempts each of num_validation_samples=0 validation problems, so nothing is measured; set "
            "num_validation_samples=20, or num_validation_attempts=0"
        )
        yield ConfigIssue("num_validation_attempts", str(config.num_validation_attempts), problem)


def batch_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if the batch sizes leave a process without samples."""
    batch_size, processes = config.batch_size, config.hardware.num_processes
    if batch_size < processes:
        problem = f"must be at least hardware.num_processes={processes}, so that each process has samples"
        yield ConfigIssue("batch_size", str(batch_size), problem)
    elif (config.micro_batch_size or 1) > (share := math.ceil(batch_size / processes)):
        problem = f"must be at most batch_size={batch_size}"
        if processes > 1:
            problem = (
                f"must be at most {share}, so that each of {processes} processes has samples of batch_size={batch_size}"
            )
        yield ConfigIssue("micro_batch_size", str(config.micro_batch_size), problem)


def model_source(config: DictConfig) -> ModelSource:
    """Return the model source that the config names. It has no tokenizer, because building a tokenizer takes time.

    Raises:
        InputError: files of the model are missing.
    """
    return build_source(config.model, None, Path(config.cache_dir))


def model_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield the issues of the model that can be found without loading its weights.

    One of them is a `data.max_length` above the maximum sequence length of the model.
    """
    source = model_source(config)
    source_issues = [ConfigIssue(f"model.{key}", value, problem) for key, value, problem in source.issues()]
    yield from source_issues
    limit = None if source_issues else source.max_positions
    length = config.data.get("max_length") if isinstance(config.data, DictConfig) else None
    if limit is not None and isinstance(length, int) and length > limit:
        yield ConfigIssue("data.max_length", str(length), f"the model reads {limit} tokens at most")


def data_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if the options for sampling the data contradict each other."""
    data = config.data
    if data.get("balance_correct") and data.get("correct_ratio") not in (None, 0.5):
        problem = f"contradicts data.correct_ratio={data.correct_ratio}; set data.correct_ratio=null"
        yield ConfigIssue("data.balance_correct", "true", problem)


def early_stopping_issues(config: DictConfig, stage: Stage | None) -> Iterator[ConfigIssue]:
    """Yield issues of early stopping.

    The issues are settings that contradict each other, and a `monitor` that is not a metric of this run or has no
    direction.
    """
    try:
        stopping: EarlyStopping = build(config.early_stopping)
    except InputError as error:
        yield ConfigIssue("early_stopping", "", str(error))
        return
    num_heads, values = model_source(config).num_heads, needs_values(config)
    names = metric_names(num_heads, values=values) if stage is None else stage.metric_names(num_heads)
    if stage is None and config.num_validation_samples:
        names += [f"val/{name}" for name in sample_metric_names(num_heads, config.num_validation_attempts)]
    problem = monitor_problem(stopping.monitor, names)
    if problem:
        yield ConfigIssue("early_stopping.monitor", stopping.monitor, problem)


def needs_values(config: DictConfig) -> bool:
    """Return whether the algorithm trains a value head.

    A control is an algorithm that wraps another algorithm. If the algorithm is a control, the wrapped one is examined.
    """
    node = config.algo
    while "of" in node:
        node = node.of
    return bool(getattr(locate(str(node["_target_"])), "needs_values", False))


def optimizer_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if the optimizer cannot train a matrix and a vector, or else if the scheduler cannot be used."""
    group = "optimizer"
    try:
        optimizer = try_optimizer(config.optimizer)
        group = "scheduler"
        try_scheduler(config.scheduler, optimizer)
    except Exception as error:  # noqa: BLE001 - the classes of torch raise many kinds of errors
        yield ConfigIssue(group, config[group]["_target_"], " ".join(str(error).split()))


def hardware_group_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue for each hardware setting that this machine cannot satisfy or that contradicts another one.

    A dry run may name hardware that this machine lacks, because it then estimates the memory and the time.
    """
    hardware = config.hardware
    allowed = lacking_hardware(config)
    for key, problem in hardware_issues(hardware.device, hardware.num_processes, hardware.strategy):
        if (key, problem) == allowed:
            continue
        yield ConfigIssue(f"hardware.{key}", str(hardware[key]), problem)


def lacking_hardware(config: DictConfig) -> tuple[str, str] | None:
    """Return the hardware option of a dry run that this machine cannot satisfy, with a description of its problem.

    The result is None if this machine has the hardware, if it is no dry run, or if torchrun has started this process.
    """
    if not config.dry_run or started_together():
        return None
    return missing_hardware(config.hardware.device, config.hardware.num_processes)
