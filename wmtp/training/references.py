"""The reference models of an algorithm, their losses as a column of the data, and a check of their quality."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from wmtp.algorithms.base import INITIAL, ReferenceName
from wmtp.config.schema import build
from wmtp.data.dataset import Dataset
from wmtp.evaluation.token_columns import column_fingerprint
from wmtp.models.mtp import MtpModel
from wmtp.training.builders import Components, build_model
from wmtp.training.start import build_stage_start, load_named
from wmtp.training.trainer import Trainer

log = logging.getLogger(__name__)

METRIC = "reference_better"
"""The share of clean validation tokens that the reference predicts better than the policy (`reference_sums`)."""


def with_reference_losses(config: DictConfig, components: Components, stage_model: MtpModel | None) -> Dataset:
    """Return the data of stage 2 with the column `reference_losses`, shape [token, reference].

    The losses are computed once and cached. The fingerprint of the new data set depends on the weights of all
    references. All ranks must call this function. `stage_model` is the trained model of stage 1, or None.

    Raises:
        InputError: a reference cannot be loaded, or a cached file cannot be read.
    """
    data, weights, losses = components.data, [], []
    classes: dict[ReferenceName, bool] = {"correct": True, "incorrect": False}
    for name, model in reference_models(config, components, stage_model):
        weights.append(column_fingerprint(model))
        losses.append(components.columns.reference_losses(model, data, classes.get(name)))
    columns = [np.stack(parts, axis=1) if len(parts) > 1 else parts[0][:, None] for parts in zip(*losses, strict=True)]
    return data.with_columns(fingerprint="".join(weights), reference_losses=columns)


def with_placeholder_losses(config: DictConfig, components: Components, stage_model: MtpModel | None) -> Dataset:
    """Return the data of stage 2 with reference losses of 0, because computing them takes long.

    If all references exist, the data have the same fingerprint as with their losses.
    """
    algorithm, data, fingerprint = components.algorithm, components.data, None
    if algorithm.reference is not None or stage_model is not None:
        models = reference_models(config, components, stage_model)
        fingerprint = "".join(column_fingerprint(model) for _, model in models)
    zeros = [np.zeros((len(split.samples.tokens), len(algorithm.references)), np.float32) for split in data.splits]
    return data.with_columns(fingerprint=fingerprint, reference_losses=zeros)


def reference_models(
    config: DictConfig, components: Components, stage_model: MtpModel | None
) -> Iterator[tuple[ReferenceName, MtpModel]]:
    """Yield the names and the frozen models of `Algorithm.references`, one after another, in their order."""
    for name in components.algorithm.references:
        yield name, build_reference(name, config, components, stage_model).eval().requires_grad_(False)


def build_reference(
    name: ReferenceName, config: DictConfig, components: Components, stage_model: MtpModel | None
) -> MtpModel:
    """Return a reference of the algorithm.

    If `algo.reference` is set, it selects the reference model. Otherwise it is `stage_model`, the model of stage 1.
    """
    reference = components.algorithm.reference
    if name == "start" and reference is None:
        return build_stage_start(config, components, build(config.pretrain))
    if name == "start" or reference == INITIAL:
        plain = {"num_heads": 1} | ({"lora": {"rank": None}} if "lora" in config.model else {})
        one_head = OmegaConf.merge(config, {"model": plain})
        assert isinstance(one_head, DictConfig)
        return build_model(one_head, components)
    if reference is not None:
        return load_named("algo.reference", Path(reference), components, Path(config.cache_dir))
    assert stage_model is not None
    return stage_model


def warn_of_weak_reference(share: float | None, when: str) -> None:
    """Log a warning if the reference predicts less than half of the clean validation tokens better than the policy.

    `share` is None if it was not measured. `when` is the time of the measurement, for the message.
    """
    if share is None or share >= 0.5:
        return
    log.warning(
        "%s, the reference predicts only %.0f %% of the clean validation tokens better than the policy, so its losses "
        "do not show which tokens are worth learning; train it longer or on more data (pretrain.num_epochs, "
        "pretrain.data), or name a better one: algo.reference=PATH",
        when, 100 * share,
    )  # fmt: skip


def measure_reference(trainer: Trainer) -> float | None:
    """Return the metric `METRIC` of the policy before training, or None if there are no validation data.

    All ranks must call this function.
    """
    measured = trainer.measure_validation()
    return None if measured is None else measured.get(METRIC)
