"""The steps before the first update of a run. A dry run takes the same steps, so it finds the same errors."""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from wmtp.algorithms.base import Algorithm
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.config.schema import build, stage_config
from wmtp.data.dataset import Dataset
from wmtp.errors import InputError
from wmtp.evaluation.token_columns import column_fingerprint
from wmtp.models.loading import build_source, check_max_positions, load_trained, load_weights
from wmtp.models.mtp import MtpModel
from wmtp.runtime.standard_streams import announce
from wmtp.training.builders import (
    Components,
    build_components,
    build_data,
    build_model,
    build_trainer,
    require_different_rewards,
    require_validation,
)
from wmtp.training.resume_check import require_same_contents
from wmtp.training.stage_results import read_stage_result, require_same_stage, require_unchanged
from wmtp.training.stages import Stage
from wmtp.training.trainer import Trainer

NO_STAGE = "There is no stage 1, because algo.reference selects the reference."


def read_components(config: DictConfig, folder: Path, algorithm: Algorithm | None) -> Components:
    """Build the objects that all stages share. If the run in `folder` is resumed, check that its data are unchanged.

    Raises:
        InputError: the data cannot be used, or have changed although `resume_override` does not name them.
    """
    announce("reading the data …")
    components = build_components(config, algorithm)
    if config.resume is not None:
        declared = config.resume_override
        components.hardware.processes.run_on_all(lambda: require_same_contents(folder, components.data, declared))
    return components


def build_stage(config: DictConfig, components: Components) -> Stage | None:
    """Return stage 1, or None if the run has no stage 1.

    A run has no stage 1 if `pretrain` is null, or if `algo.reference` selects an existing reference model.
    """
    if config.pretrain is None or components.algorithm.reference is not None:
        return None
    stage: Stage = build(config.pretrain)
    return stage


def build_stage_data(config: DictConfig, components: Components, stage: Stage) -> Dataset:
    """Return the data set of stage 1.

    Raises:
        InputError: the data cannot be used, there are no validation samples although early stopping needs them, or the
            stage compares correct with incorrect solutions and all training samples have the same reward.
    """
    settings = stage_config(config)
    shares_data = settings.data == config.data and settings.order_seed == config.order_seed
    try:
        data = components.data if shares_data else build_data(settings, components.hardware, components.tokenizer)
    except InputError as error:
        raise InputError(f"{error}\nThese are the data of stage 1: pretrain.data") from error
    require_validation(settings, data, is_stage_1=True)
    if "correct" in stage.references and len(set(data.train.is_correct.tolist())) < 2:
        raise InputError(
            "pretrain.data: the stage compares correct with incorrect solutions, but the training data have only one "
            "kind; use both (data.correct_ratio=0.5; add data.mismatched=true to create incorrect ones)"
        )
    if stage.trains_policy or "reward_model" in stage.references:
        require_different_rewards(data)
    return data


def load_named(key: str, path: Path, components: Components, cache_dir: Path) -> MtpModel:
    """Load the model that the config key `key` names: a run's folder, a checkpoint or a Hugging Face model folder.

    Raises:
        InputError: `path` contains no model, its tokenizer is not that of the policy, or its maximum length is below
            `data.max_length`.
    """
    try:
        model = load_trained(path, components.tokenizer, components.hardware, cache_dir, key=key)
        check_max_positions(model, components.data.max_length, "data.max_length")
    except InputError as error:
        prefix = "" if str(error).startswith(key) else f"{key}={path}: "
        raise InputError(f"{prefix}{error}") from error
    return model


def build_stage_start(config: DictConfig, components: Components, stage: Stage) -> MtpModel:
    """Return the model with which stage 1 begins.

    Raises:
        InputError: `pretrain.start` contains no model, or another one than `model` and `pretrain.model` describe.
    """
    model = build_model(stage_config(config), components)
    if stage.start is None:
        return model
    found = load_named("pretrain.start", stage.start, components, Path(config.cache_dir))
    if model.base_fingerprint not in (None, found.base_fingerprint):
        raise InputError(f"pretrain.start={stage.start}: its model was trained from other pretrained weights")
    state = found.state_dict()
    try:
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    except (KeyError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"pretrain.start={stage.start}: its model is not that of stage 1: {problem}") from error
    return model


def build_stage_trainer(
    config: DictConfig, folder: Path, components: Components, stage: Stage, *, with_columns: bool = True
) -> Trainer:
    """Return the trainer of stage 1.

    Args:
        config: the config of the run.
        folder: the folder for the checkpoints of stage 1.
        components: the objects shared by all stages.
        stage: stage 1.
        with_columns: whether to precompute the hidden states or losses that the stage needs. Otherwise, there are no
            hidden states, and the losses are 0.

    Raises:
        InputError: the data of stage 1 cannot be used.
    """
    settings, data = stage_config(config), build_stage_data(config, components, stage)
    model = build_stage_start(config, components, stage)
    stage.add_modules(model)
    stage.prepare(model, data)
    stage.freeze(model)
    if stage.needs_hidden_states and with_columns:
        data = components.columns.with_hidden_states(model, data)
    if stage.needs_start_losses:
        columns = [np.zeros(len(split.samples.tokens), np.float32) for split in data.splits]
        if with_columns:
            columns = components.columns.reference_losses(model, data)
        losses = [column[:, None] for column in columns]
        data = data.with_columns(fingerprint=column_fingerprint(model), reference_losses=losses)
    return build_trainer(settings, folder, components.hardware, data, model, stage.objective(config.objective.shares))


def find_stage_result(folder: Path, config: DictConfig, stage: Stage) -> str | None:
    """Return the path of the run whose finished stage 1 is used, or None if stage 1 must be trained.

    This is `folder`, which is the folder of the run itself, or else the run that `pretrain.reuse` names.

    Raises:
        InputError: the run has begun with another stage 1, or the run that `pretrain.reuse` names has no finished
            stage 1 that matches the config.
    """
    require_unchanged(folder, config)
    if read_stage_result(folder) is not None:
        return str(folder)
    if stage.reuse is None:
        return None
    require_same_stage(stage.reuse, config)
    return str(stage.reuse)


def load_stage_model(saved: Path, config: DictConfig, components: Components, stage: Stage) -> MtpModel:
    """Return the model of stage 1 from its checkpoint `saved`.

    Raises:
        InputError: the checkpoint is damaged or does not match the config.
    """
    model = build_source(stage_config(config).model, components.tokenizer, Path(config.cache_dir)).empty()
    stage.add_modules(model)
    return load_weights(saved, model, components.tokenizer, components.hardware)


def restore_latest(trainer: Trainer, config: DictConfig, store: CheckpointStore) -> tuple[Path, dict[str, str]] | None:
    """Load the latest checkpoint of a stage from `store` into its trainer.

    Do nothing if the run is not resumed or if the stage has no checkpoint.

    Returns:
        The checkpoint, and a description of each setting that has changed since then; None if nothing was loaded.

    Raises:
        InputError: there is no undamaged checkpoint, or a setting has changed that `resume_override` does not name.
    """
    if config.resume is None or not store.has_any():
        return None
    checkpoint = store.latest()
    snapshot = load(checkpoint, dict(trainer.model.named_parameters()), verified=True)
    return checkpoint, trainer.restore(snapshot, config.resume_override)
