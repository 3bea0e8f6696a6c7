"""From a checked config to objects: the parts that all stages share, and the trainer of each stage."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from wmtp.algorithms.base import Algorithm
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.config import ConfigError, Fault, build, node_faults, stage_config
from wmtp.data.dataset import Dataset
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.optimization import parameter_groups
from wmtp.plan import Plan
from wmtp.runtime.hardware import Hardware
from wmtp.runtime.seeding import seed_torch
from wmtp.stages import Stage
from wmtp.token_columns import TokenColumns
from wmtp.trainer import Trainer


@dataclass(frozen=True)
class Parts:
    """What the stages of a run share."""

    hardware: Hardware
    data: Dataset
    algorithm: Algorithm
    columns: TokenColumns


def compose_parts(config: DictConfig) -> Parts:
    """Read the data and prepare the machine; nothing is trained yet."""
    hardware: Hardware = build(config.hardware)
    data = compose_data(config, hardware)
    columns = TokenColumns(Path(config.cache_dir), data.tokenizer, hardware)
    return Parts(hardware, data, build(config.algo), columns)


def compose_data(config: DictConfig, hardware: Hardware) -> Dataset:
    """The data set, with rewards from a reward model if the config names one."""
    cache_dir = Path(config.cache_dir)
    source = build(config.data, cache_dir=cache_dir)
    data = Dataset(source, cache_dir, config.seed)
    if source.reward_model is not None:
        from wmtp.models.huggingface import RewardModel  # imports transformers, which takes seconds

        reward_model = RewardModel(source.reward_model, data.tokenizer, hardware)
        for split in (data.train, data.validation):
            split.rewards = reward_model.rewards(split)
        data.depend_on(reward_model.fingerprint)
    return data


def compose_model(config: DictConfig, parts: Parts, *, values: bool) -> MtpModel:
    """The network with new parameters, a pure function of the seed; the value head comes last."""
    seed_torch(config.seed)
    model: MtpModel = build(config.model, vocab_size=parts.data.tokenizer.vocab_size)
    if values:
        model.add_value_head()
    return model.to(parts.hardware.device)


def compose_trainer(
    config: DictConfig, folder: Path, hardware: Hardware, data: Dataset, model: MtpModel, objective: Objective
) -> Trainer:
    """The trainer of one stage. `folder` takes its checkpoints."""
    optimizer = build(config.optimizer, params=parameter_groups(model))
    plan = build(config, Plan, num_samples=len(data.train))
    trainer: Trainer = build(
        config,
        model=model,
        objective=objective,
        data=data,
        optimizer=optimizer,
        scheduler=build(config.scheduler, optimizer=optimizer, num_updates=plan.num_updates),
        checkpoints=build(config.checkpoint, folder=folder),
        hardware=hardware,
        plan=plan,
        early_stopping=build(config.early_stopping),
    )
    return trainer


def compose_stage(config: DictConfig, folder: Path, parts: Parts, stage: Stage) -> Trainer:
    """The trainer of the stage before, whose checkpoints go below `folder`/pretrain."""
    stage_settings = stage_config(config)
    same = stage_settings.data == config.data and stage_settings.seed == config.seed
    data = parts.data if same else compose_data(stage_settings, parts.hardware)
    model = compose_model(stage_settings, parts, values=stage.trains_policy)
    stage.freeze(model)
    if stage.needs_hidden_states:
        parts.columns.attach_hidden_states(model, data)
    return compose_trainer(stage_settings, folder / "pretrain", parts.hardware, data, model, stage.objective())


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint that a path means, and the config it was made with.

    A run's folder means its best checkpoint, or its last where nothing was validated.

    Raises:
        InputError: there is none.
    """
    if (path / "manifest.json").exists():
        return path, path.parent.parent / "config.yaml"
    if not (path / "checkpoints").is_dir():
        raise InputError(f"{path}: neither a run's folder nor a checkpoint: it has no checkpoints and no manifest.json")
    store = CheckpointStore(path)
    return store.best() or store.latest(), path / "config.yaml"


def load_model_from(path: Path, parts: Parts, model: MtpModel | None = None) -> MtpModel:
    """The model of a run or checkpoint: that given, filled; or one as its config.yaml describes it.

    Raises:
        InputError: it is damaged, was trained with another tokenizer, or does not fit the model.
    """
    checkpoint, config_path = find_checkpoint(path)
    snapshot = load(checkpoint)
    theirs, ours = snapshot.state["identity"]["tokenizer"], parts.data.tokenizer.fingerprint
    if theirs != ours:
        raise InputError(f"{path}: was trained with another tokenizer: {theirs[:16]}…, here it is {ours[:16]}…")
    if model is None:
        model = model_from_file(config_path, parts)
        if any(name.startswith("value_head.") for name in snapshot.model):
            model.add_value_head()
    try:
        model.load_state_dict(snapshot.model)
    except RuntimeError as error:
        raise InputError(f"{checkpoint}: does not fit the model: {' '.join(str(error).split())}") from error
    return model.to(parts.hardware.device)


def model_from_file(config_path: Path, parts: Parts) -> MtpModel:
    """A new model as a run's config.yaml describes it; that file is input, and checked like any other."""
    if not config_path.exists():
        raise InputError(f"{config_path}: is missing; it says how the checkpoint's model is made")
    config = OmegaConf.load(config_path)
    node = config.get("model") if isinstance(config, DictConfig) else None
    if not isinstance(node, DictConfig) or not str(node.get("_target_")).startswith("wmtp.models."):
        raise InputError(f"{config_path}: its model is none of wmtp's")
    if faults := list(node_faults(node, "model")):
        raise ConfigError([Fault(f"{config_path}: {fault.key}", fault.value, fault.problem) for fault in faults])
    model: MtpModel = build(node, vocab_size=parts.data.tokenizer.vocab_size)
    return model
