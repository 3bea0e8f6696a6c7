"""Functions that build the objects of a training run from a validated config, for example the data and the trainers."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from wmtp.algorithms.base import Algorithm
from wmtp.config.schema import build
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.sources import DataSource
from wmtp.data.token_labels import harmful_tokens, has_token_labels
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.distributed.parallelize import parallelize
from wmtp.distributed.rng import seed_torch
from wmtp.errors import InputError, SandboxUnavailable
from wmtp.evaluation.in_training import SampleEvaluation
from wmtp.evaluation.sampling import Grader
from wmtp.evaluation.token_columns import TokenColumns
from wmtp.models.loading import build_source
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.objectives.loss_history import LossHistory
from wmtp.objectives.mtp import MtpObjective
from wmtp.objectives.value_loss import ValueLoss
from wmtp.sandbox.grader import grade
from wmtp.sandbox.isolation import find_isolation
from wmtp.sandbox.limits import Limits
from wmtp.training.optim import parameter_groups
from wmtp.training.plan import Plan
from wmtp.training.stages import Stage, ValueStage
from wmtp.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """The objects shared by all stages of a run."""

    hardware: Hardware
    data: Dataset
    algorithm: Algorithm
    columns: TokenColumns

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that all models and all data of the run use."""
        return self.data.tokenizer


def build_components(config: DictConfig, algorithm: Algorithm | None = None) -> Components:
    """Set up the hardware, read the data and build the algorithm.

    Raises:
        InputError: the data, the tokenizer or the settings of the algorithm cannot be used.
    """
    hardware: Hardware = build(config.hardware)
    tokenizer = build_tokenizer(config, hardware)
    data = build_data(config, hardware, tokenizer)
    require_validation(config, data)
    columns = TokenColumns(Path(config.cache_dir), tokenizer, hardware)
    if algorithm is None:  # this process did not check the config
        algorithm = build(config.algo)
    assert algorithm is not None
    if algorithm.needs_token_labels:
        data = with_token_labels(data)
    return Components(hardware, data, algorithm, columns)


def build_tokenizer(config: DictConfig, hardware: Hardware) -> Tokenizer:
    """Return the tokenizer of the model.

    Rank 0 builds the tokenizer first and writes the tokenizer's files to the cache. The other ranks then read these
    files.
    """

    def _build() -> Tokenizer:
        """Build the tokenizer."""
        tokenizer: Tokenizer = build(config.model.tokenizer, cache_dir=Path(config.cache_dir))
        return tokenizer

    processes = hardware.processes
    return processes.run_on_all(lambda: _build() if processes.is_main else None) or _build()


def build_data(config: DictConfig, hardware: Hardware, tokenizer: Tokenizer) -> Dataset:
    """Return the data set. If the config names a reward model, the rewards are the scores of that model.

    Rank 0 reads the data first and caches its tokens on disk. The other ranks then read the cache.

    Raises:
        InputError: the ranks have read different data.
    """
    cache_dir, processes = Path(config.cache_dir), hardware.processes

    def _read() -> tuple[DataSource, Dataset]:
        """Read the data."""
        source: DataSource = build(config.data, tokenizer=tokenizer)
        return source, read_dataset(source, cache_dir, config.order_seed)

    first = processes.run_on_all(lambda: _read() if processes.is_main else None)
    source, data = first or _read()
    if source.reward_model is not None:
        data = with_rewards(data, source.reward_model, hardware)
    fingerprints = processes.gather(data.fingerprint)
    if len(set(fingerprints)) > 1:
        raise InputError(f"data: the processes have read different data, with the hashes {', '.join(fingerprints)}")
    return data


def require_validation(config: DictConfig, data: Dataset, *, is_stage_1: bool = False) -> None:
    """Check that there are validation data if a setting depends on them.

    `config` is the config of the run, or of stage 1 if `is_stage_1` is true. Stage 1 generates no samples.

    Raises:
        InputError: there are no validation data, and early stopping or sampling needs them.
    """
    stopping, prefix, needs = config.early_stopping, "pretrain." if is_stage_1 else "", {}
    if not len(data.validation) and stopping.get("patience") is not None and stopping.monitor.startswith("val/"):
        needs[f"{prefix}early_stopping.patience={stopping.patience}"] = f"{prefix}early_stopping=none"
    if not data.validation.records and config.num_validation_samples and not is_stage_1:
        needs[f"num_validation_samples={config.num_validation_samples}"] = "num_validation_samples=0"
    if needs:
        reason = f" not longer than data.max_length={data.max_length}" if data.validation.records else ""
        raise InputError(
            f"{prefix}data: there are no validation samples{reason}, but {' and '.join(needs)} need some. Add some (a "
            f"single file needs at least two tasks), or train without: {' '.join(needs.values())}"
        )


def with_rewards(data: Dataset, path: Path, hardware: Hardware) -> Dataset:
    """Return the data set with the scores of the reward model in the folder `path` as rewards.

    The model runs on rank 0 only, and the other ranks receive its scores. The fingerprint of the data set depends on
    the weights of the model.

    Raises:
        InputError: the folder contains no usable reward model, or a sample is too long for the reward model.
    """

    def _score() -> tuple[str, list[list[float]]]:
        """Return the fingerprint of the reward model, and its scores for each split."""
        from wmtp.models.huggingface.reward_model import RewardModel  # imports transformers, which takes seconds

        reward_model = RewardModel(path, data.tokenizer, hardware)
        return reward_model.fingerprint, [reward_model.rewards(split).tolist() for split in data.splits]

    fingerprint, scores = hardware.processes.run_on_main(_score)
    return data.with_columns(fingerprint=fingerprint, rewards=[np.asarray(rewards, np.float32) for rewards in scores])


def with_token_labels(data: Dataset) -> Dataset:
    """Return the data set with the column `harmful`, which labels every token as harmful or not.

    The labels are computed by `harmful_tokens` from the decisive spans and the noise spans in the records.

    Raises:
        InputError: no training record contains such spans.
    """
    if not has_token_labels(data.train):
        raise InputError(
            "data: no record has decisive or noise spans, which algo=oracle needs to identify harmful tokens"
        )
    return data.with_columns(harmful=[harmful_tokens(split, data.tokenizer) for split in data.splits])


def build_model(config: DictConfig, components: Components) -> MtpModel:
    """Return the model with its initial weights, on the device that the config selects.

    Random weights are determined by the seed of `config`, which is the config of the run or of stage 1.
    """
    seed_torch(config.seed)
    model = build_source(config.model, components.tokenizer, Path(config.cache_dir)).create()
    return model.to(components.hardware.device)


def build_sample_evaluation(config: DictConfig, folder: Path, components: Components) -> SampleEvaluation:
    """Return the evaluation that samples solutions to validation and test problems during training."""
    data, processes = components.data, components.hardware.processes
    return SampleEvaluation(
        folder,
        data,
        build_grader(config, data) if processes.is_main else None,
        processes,
        num_validation=config.num_validation_samples,
        num_test=config.num_samples,
        num_attempts=config.num_validation_attempts,
    )


def build_grader(config: DictConfig, data: Dataset) -> Grader | None:
    """Return the function that runs the tests of a problem on a program that the model has generated.

    Return None if the config requests no samples, if no record has tests, or if `sandbox` is `auto` and no sandbox is
    available.

    Raises:
        SandboxUnavailable: the config names a sandbox that cannot be used.
    """
    has_samples = config.num_validation_samples or config.num_samples
    if not has_samples or not any(record.tests for record in (*data.validation.records, *data.test)):
        return None
    try:
        isolation = find_isolation(config.sandbox)
    except SandboxUnavailable as error:
        if config.sandbox != "auto":
            raise
        log.warning("the model's programs are not run, so there is no val/pass_rate and no pass@1: %s", error)
        return None
    if isolation.name == "none":
        log.warning("sandbox=none: the model's programs run unprotected, with access to your files and network")
    return partial(grade, isolation=isolation, limits=Limits())


def build_trainer(
    config: DictConfig,
    folder: Path,
    hardware: Hardware,
    data: Dataset,
    model: MtpModel,
    objective: Objective,
    sample_evaluation: SampleEvaluation | None = None,
) -> Trainer:
    """Return the trainer of one stage, and parallelize the model in place.

    Args:
        config: the config of this stage.
        folder: the folder for the stage's checkpoints.
        hardware: device, precision and processes.
        data: the data set.
        model: the model. Its weights must be the same in all processes.
        objective: the objective to train for.
        sample_evaluation: the evaluation that samples solutions at every validation. If it is None, no solutions are
            sampled.
    """
    processes = hardware.processes
    if not processes.is_main:
        seed_torch(config.seed, processes.rank)  # each rank draws its own dropout masks
    model.activation_checkpointing = hardware.activation_checkpointing
    blocks = [*model.trunk, *model.heads]
    if hardware.compile:
        for block in blocks:
            block.compile()
    value_heads = [] if model.value_head is None else [model.value_head]  # always fp32
    parallelize(model, blocks, hardware.strategy, hardware.precision, keep_fp32=value_heads)
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
        sample_evaluation=sample_evaluation,
    )
    return trainer


def build_policy(config: DictConfig, components: Components, stage_model: MtpModel | None) -> MtpModel:
    """Return the model to train in stage 2.

    If stage 1 has trained the policy, this is `stage_model`. If `stage_model` is None, a new model is built.
    """
    algorithm = components.algorithm
    if algorithm.needs_rewards:
        require_different_rewards(components.data)
    if stage_model is None:
        model = build_model(config, components)
        if algorithm.needs_values:
            mean_reward = float(components.data.train.rewards.mean())
            model.add_value_head(algorithm.value).set_output(ValueLoss().first_output(mean_reward))
        return model
    if not algorithm.needs_values:
        stage_model.value_head = None
    seed_torch(config.seed)  # same dropout masks when a run resumes after stage 1
    stage_model.set_trainable()
    return stage_model


def build_objective(
    config: DictConfig, components: Components, data: Dataset, stage: Stage | None = None
) -> MtpObjective:
    """Return the objective of stage 2, after the algorithm has computed its constants from the data of stage 2.

    If stage 1 has trained the value head, stage 2 continues with its value loss.
    """
    algorithm = components.algorithm
    algorithm.prepare(data.train)
    history = LossHistory(data.train, components.hardware.processes) if algorithm.needs_previous_losses else None
    value_loss = stage.value_loss if isinstance(stage, ValueStage) else None
    objective: MtpObjective = build(config.objective, algorithm=algorithm, value_loss=value_loss, history=history)
    return objective


def require_different_rewards(data: Dataset) -> None:
    """Check that the rewards of the training samples differ, because otherwise they contain no information.

    Raises:
        InputError: every training sample has the same reward.
    """
    rewards = data.train.rewards
    if rewards.min() == rewards.max():
        raise InputError(
            f"data: every training sample has the reward {rewards[0]:g}, so rewards contain no information; "
            "use right and wrong solutions (data.correct_ratio=0.5; add data.mismatched=true to create wrong ones)"
        )
