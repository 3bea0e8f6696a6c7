"""From a checked config to objects: the parts that all stages share, and the trainer of each stage."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from wmtp.algorithms.base import INITIAL, Algorithm
from wmtp.config.schema import build, stage_config
from wmtp.data.dataset import Dataset
from wmtp.data.sources import DataSource
from wmtp.data.token_labels import has_truth, misleading_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.distributed.parallelize import parallelise
from wmtp.distributed.rng import seed_torch
from wmtp.errors import InputError, SandboxUnavailable
from wmtp.evaluation.in_training import HeldOutProblems
from wmtp.evaluation.sampling import Judge
from wmtp.models.loading import compose_source, load_trained, require_room
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.sandbox.grader import judge
from wmtp.sandbox.isolation import find_isolation
from wmtp.sandbox.limits import Limits
from wmtp.training.optim import parameter_groups
from wmtp.training.plan import Plan
from wmtp.training.precompute import TokenColumns
from wmtp.training.stages import Stage
from wmtp.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the stages of a run share."""

    hardware: Hardware
    data: Dataset
    algorithm: Algorithm
    columns: TokenColumns

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the policy, and so of all data and other models."""
        return self.data.tokenizer


def compose_parts(config: DictConfig) -> Parts:
    """Read the data and prepare the machine; nothing is trained yet."""
    hardware: Hardware = build(config.hardware)
    tokenizer = compose_tokenizer(config, hardware)
    data = compose_data(config, hardware, tokenizer)
    columns = TokenColumns(Path(config.cache_dir), tokenizer, hardware)
    algorithm: Algorithm = build(config.algo)
    if algorithm.needs_truth:
        attach_truth(data)
    return Parts(hardware, data, algorithm, columns)


def compose_tokenizer(config: DictConfig, hardware: Hardware) -> Tokenizer:
    """The model's tokenizer. The first process makes what is not on disk yet, then the others find it there."""

    def made() -> Tokenizer:
        tokenizer: Tokenizer = build(config.model.tokenizer, cache_dir=Path(config.cache_dir))
        return tokenizer

    processes = hardware.processes
    return processes.together(lambda: made() if processes.is_main else None) or made()


def compose_data(config: DictConfig, hardware: Hardware, tokenizer: Tokenizer) -> Dataset:
    """The data set, with rewards from a reward model if the config names one.

    The first process reads it, then the others, which find its tokens on disk.

    Raises:
        InputError: processes have read different data.
    """
    cache_dir, processes = Path(config.cache_dir), hardware.processes

    def read() -> tuple[DataSource, Dataset]:
        source: DataSource = build(config.data, tokenizer=tokenizer)
        return source, Dataset(source, cache_dir, config.seed)

    first = processes.together(lambda: read() if processes.is_main else None)
    source, data = first or read()
    if source.reward_model is not None:
        attach_rewards(data, source.reward_model, hardware)
    found = processes.gather(data.fingerprint)
    if len(set(found)) > 1:
        raise InputError(f"data: the processes have read different data, with the hashes {', '.join(found)}")
    return data


def attach_rewards(data: Dataset, path: Path, hardware: Hardware) -> None:
    """Give every sample the reward that a reward model finds in the first process."""
    splits = (data.train, data.validation)

    def measure() -> tuple[str, list[list[float]]]:
        from wmtp.models.huggingface.reward_model import RewardModel  # imports transformers, which takes seconds

        reward_model = RewardModel(path, data.tokenizer, hardware)
        return reward_model.fingerprint, [reward_model.rewards(split).tolist() for split in splits]

    fingerprint, found = hardware.processes.from_main(measure)
    for split, rewards in zip(splits, found, strict=True):
        split.rewards = np.asarray(rewards, np.float32)
    data.depend_on(fingerprint)


def attach_truth(data: Dataset) -> None:
    """Say of every token whether it misleads.

    Raises:
        InputError: the data do not know.
    """
    if not has_truth(data.train):
        raise InputError("data: no token is known to mislead; algo=oracle needs records with decisive or noise spans")
    for split in (data.train, data.validation):
        split.misleading = misleading_tokens(split, data.tokenizer)


def compose_model(config: DictConfig, parts: Parts, *, values: bool) -> MtpModel:
    """The network as training begins; what is drawn is a pure function of the seed, and the value head comes last."""
    seed_torch(config.seed)
    model = compose_source(config.model, parts.tokenizer, Path(config.cache_dir)).new()
    if values:
        model.add_value_head()
    return model.to(parts.hardware.device)


def compose_held_out(config: DictConfig, folder: Path, parts: Parts) -> HeldOutProblems:
    """The problems that show what the model learns."""
    data, processes = parts.data, parts.hardware.processes
    return HeldOutProblems(
        folder,
        data,
        compose_judge(config, data) if processes.is_main else None,
        processes,
        num_validation=config.num_validation_samples,
        num_test=config.num_samples,
    )


def compose_judge(config: DictConfig, data: Dataset) -> Judge | None:
    """What runs the model's programs; None where there are no tests, or where nothing can run programs safely.

    Raises:
        SandboxUnavailable: the sandbox that the config names cannot be used.
    """
    asked = config.num_validation_samples or config.num_samples
    if not asked or not any(record.tests for record in (*data.validation.records, *data.test)):
        return None
    try:
        isolation = find_isolation(config.sandbox)
    except SandboxUnavailable as error:
        if config.sandbox != "auto":
            raise
        log.warning("the model's programs are not run, so there is no val/pass_rate and no pass@1: %s", error)
        return None
    if isolation.name == "none":
        log.warning("sandbox=none: the model's programs run unprotected, with your files and network")
    return partial(judge, isolation=isolation, limits=Limits())


def compose_trainer(
    config: DictConfig,
    folder: Path,
    hardware: Hardware,
    data: Dataset,
    model: MtpModel,
    objective: Objective,
    held_out: HeldOutProblems | None = None,
) -> Trainer:
    """The trainer of one stage. `folder` takes its checkpoints. The model is from now on that of all processes."""
    processes = hardware.processes
    if not processes.is_main:
        seed_torch(config.seed, processes.rank)  # each draws a dropout of its own
    model.activation_checkpointing = hardware.activation_checkpointing
    blocks = [*model.trunk, *model.heads]
    if hardware.compile:
        for block in blocks:
            block.compile()
    values = [] if model.value_head is None else [model.value_head]  # fp32 whatever the others are
    parallelise(model, blocks, hardware.strategy, hardware.precision, exact=values)
    optimizer = build(config.optimizer, params=parameter_groups(model))
    plan = build(config, Plan, num_samples=len(data.train), num_processes=processes.size)
    trainer: Trainer = build(
        config,
        model=model,
        objective=objective,
        data=data,
        optimizer=optimizer,
        scheduler=build(config.scheduler, optimizer=optimizer, num_updates=plan.num_updates),
        checkpoints=build(config.checkpoint, folder=folder, processes=processes),
        hardware=hardware,
        plan=plan,
        early_stopping=build(config.early_stopping),
        held_out=held_out,
    )
    return trainer


def compose_stage(config: DictConfig, parts: Parts) -> Stage | None:
    """The stage before the training, if there is one; a reference that was named needs none."""
    if config.pretrain is None or parts.algorithm.reference is not None:
        return None
    stage: Stage = build(config.pretrain)
    return stage


def compose_stage_trainer(
    config: DictConfig, folder: Path, parts: Parts, stage: Stage, *, with_columns: bool = True
) -> Trainer:
    """The trainer of the stage before, whose checkpoints go to `folder`.

    Raises:
        InputError: the stage's data are not there, or teach it nothing.
    """
    settings = stage_config(config)
    same = settings.data == config.data and settings.seed == config.seed
    try:
        data = parts.data if same else compose_data(settings, parts.hardware, parts.tokenizer)
    except InputError as error:
        raise InputError(f"{error}\nThese are the data of the stage before the training: pretrain.data") from error
    if stage.trains_policy:
        require_different_rewards(data)
    model = compose_model(settings, parts, values=stage.trains_policy)
    stage.freeze(model)
    if stage.needs_hidden_states and with_columns:
        parts.columns.attach_hidden_states(model, data)
    return compose_trainer(settings, folder, parts.hardware, data, model, stage.objective())


def compose_reference(config: DictConfig, parts: Parts, stage_model: MtpModel | None) -> MtpModel | None:
    """The frozen reference, if the algorithm needs one: the model of the stage before, or the one that it names."""
    reference = parts.algorithm.reference
    if not parts.algorithm.needs_reference:
        return None
    if reference == INITIAL:
        one_head = OmegaConf.merge(config.model, {"num_heads": 1, "lora": {"rank": None}})
        assert isinstance(one_head, DictConfig)
        source = compose_source(one_head, parts.tokenizer, Path(config.cache_dir))
        stage_model = source.new().to(parts.hardware.device)
    elif reference is not None:
        stage_model = load_reference(Path(reference), parts, Path(config.cache_dir))
    assert stage_model is not None
    return stage_model.eval().requires_grad_(False)


def load_reference(path: Path, parts: Parts, cache_dir: Path) -> MtpModel:
    """The model of a run, checkpoint or folder of transformers that the user named as the reference.

    Raises:
        InputError: there is none, its tokenizer is another, or it cannot read texts as long as the data's.
    """
    try:
        model = load_trained(path, parts.tokenizer, parts.hardware, cache_dir)
        require_room(model, parts.data.max_length, "data.max_length")
    except InputError as error:
        prefix = "" if str(error).startswith("algo.reference") else f"algo.reference={path}: "
        raise InputError(f"{prefix}{error}") from error
    return model


def compose_policy(config: DictConfig, parts: Parts, stage_model: MtpModel | None) -> MtpModel:
    """The model to be trained: a new one, or that of a stage which has trained it before."""
    algorithm = parts.algorithm
    if algorithm.needs_values:
        require_different_rewards(parts.data)
    if stage_model is None:
        return compose_model(config, parts, values=algorithm.needs_values)
    if not algorithm.needs_values:
        stage_model.value_head = None
    seed_torch(config.seed)  # a run that finds its stage done draws the same dropout
    stage_model.train_all()
    return stage_model


def require_different_rewards(data: Dataset) -> None:
    """Raises `InputError` where every solution has the same reward: values have nothing to learn then."""
    rewards = data.train.rewards
    if rewards.min() == rewards.max():
        raise InputError(
            f"data: every training sample has the reward {rewards[0]:g}, so values have nothing to learn; "
            "take right and wrong solutions (data.correct_ratio=0.5; data.mismatched=true makes wrong ones)"
        )
