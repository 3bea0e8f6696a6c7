"""The steps before the first update of a run. A dry run takes the same steps, so it finds the same errors."""

from pathlib import Path

from omegaconf import DictConfig

from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.config.schema import stage_config
from wmtp.models.loading import build_source, load_weights
from wmtp.models.mtp import MtpModel
from wmtp.training.builders import Components
from wmtp.training.stage_results import read_stage_result, require_same_stage, require_unchanged
from wmtp.training.stages import Stage
from wmtp.training.trainer import Trainer


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
    if stage.trains_policy:
        model.add_value_head()
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
