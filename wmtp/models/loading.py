"""Trained models: from a run's folder or a checkpoint to a model, its tokenizer and the config it was made with."""

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from wmtp.checkpoint.state import load_model
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.config.moved_targets import load_run_config
from wmtp.config.schema import ConfigError, Fault, build, node_faults
from wmtp.data.tokenizer import Tokenizer, read_backend, tokenizer_difference
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel
from wmtp.models.source import ModelSource

FROM_CONFIG = {"model": ("wmtp.models.",), "model.tokenizer": ("wmtp.data.tokenizer.", "wmtp.models.")}
"""What is made as a run's config.yaml says, and where it must come from: the file is input like any other."""
MODEL_FOLDER = "model"
"""The part of a run's folder that keeps what describes a pretrained model, and its tokenizer."""


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint that a path means, and the config it was made with.

    A run's folder means its best checkpoint, or its last where nothing was validated.

    Raises:
        InputError: there is none.
    """
    if (path / "manifest.json").exists():
        return path, path.parent.parent / "config.yaml"
    if not (path / "checkpoints").is_dir():
        what = "neither a run's folder nor a checkpoint nor a pretrained model"
        raise InputError(f"{path}: {what}: it has no checkpoints, manifest.json or config.json")
    store = CheckpointStore(path)
    return store.best() or store.latest(), path / "config.yaml"


def read_config(path: Path) -> DictConfig:
    """The config.yaml of a run, whose model is described by what the run keeps of it.

    Raises:
        InputError: it is missing, or its model or tokenizer is none of wmtp's or has faults.
    """
    if not path.exists():
        raise InputError(f"{path}: is missing; it says how the checkpoint's model is made")
    config = load_run_config(path)
    if (kept := path.parent / MODEL_FOLDER).is_dir():
        config.model.tokenizer.path = str(kept)
        if not OmegaConf.select(config, "model.lora.rank"):  # adapters need the weights that they stand beside
            config.model.path = str(kept)
    faults: list[Fault] = []
    for key, origins in FROM_CONFIG.items():
        node = OmegaConf.select(config, key)
        if not isinstance(node, DictConfig) or not str(node.get("_target_")).startswith(origins):
            raise InputError(f"{path}: its {key} is none of wmtp's")
        faults += node_faults(node, key)
    if faults:
        raise ConfigError([Fault(f"{path}: {fault.key}", fault.value, fault.problem) for fault in faults])
    return config


def compose_source(node: DictConfig, tokenizer: Tokenizer | None, cache_dir: Path) -> ModelSource:
    """The source of a model with this tokenizer, which the node describes too."""
    described = OmegaConf.masked_copy(node, [str(key) for key in node if key != "tokenizer"])
    source: ModelSource = build(described, tokenizer=tokenizer, cache_dir=cache_dir)
    return source


def load_weights(checkpoint: Path, model: MtpModel, tokenizer: Tokenizer, hardware: Hardware) -> MtpModel:
    """The model with the weights of a checkpoint.

    Raises:
        InputError: it is damaged, was trained with another tokenizer, or does not fit the model.
    """
    snapshot = load(checkpoint, optimizer=False)
    theirs, ours = snapshot.state["identity"]["tokenizer"], tokenizer.fingerprint
    if theirs != ours:
        raise InputError(f"{checkpoint}: was trained with another tokenizer: {theirs[:16]}…, here it is {ours[:16]}…")
    if model.value_head is None:
        snapshot.model = {name: x for name, x in snapshot.model.items() if not name.startswith("value_head.")}
    if (base := snapshot.state["identity"].get("base")) != model.base_fingerprint:
        theirs, ours = ("none" if each is None else f"{each[:16]}…" for each in (base, model.base_fingerprint))
        raise InputError(f"{checkpoint}: its adapters belong to another base model: {theirs}, here it is {ours}")
    try:
        load_model(model, snapshot.model, model.base)
    except RuntimeError as error:
        raise InputError(f"{checkpoint}: does not fit the model: {' '.join(str(error).split())}") from error
    return model.to(hardware.device)


def load_trained(path: Path, tokenizer: Tokenizer, hardware: Hardware, cache_dir: Path) -> MtpModel:
    """The model of a run or checkpoint, made as the config.yaml beside it says, without its value head; or a
    pretrained one, with one head.

    Raises:
        InputError: its files are missing or damaged, or the tokenizer is another.
    """
    if (path / "config.json").is_file():
        return _load_pretrained(path, tokenizer).to(hardware.device)
    found = hardware.processes.from_main(lambda: [str(each) for each in find_checkpoint(path)])
    checkpoint, config_path = map(Path, found)
    source = compose_source(read_config(config_path).model, tokenizer, cache_dir)
    return load_weights(checkpoint, source.blank(), tokenizer, hardware)


def _load_pretrained(path: Path, tokenizer: Tokenizer) -> MtpModel:
    from wmtp.models.huggingface.pretrained import Pretrained  # imports transformers, which takes seconds

    source = Pretrained(tokenizer=tokenizer, path=path, num_heads=1, lora=Lora())
    source.key = "algo.reference"
    if problems := list(source.problems()):
        raise source.error("; ".join(problem for _, _, problem in problems))
    difference = tokenizer_difference(tokenizer, read_backend(path / "tokenizer.json"))
    if difference is not None:
        raise InputError(
            f"{path}: its tokenizer is not that of the policy: {difference}; use a model with the same one"
        )
    return source.new()


def require_room(model: MtpModel, length: int, key: str) -> None:
    """Raises `InputError` where a model cannot read texts of this many tokens, which `key` asks for."""
    limit = model.architecture.max_positions
    if limit is not None and length > limit:
        raise InputError(f"{key}={length}: the model reads {limit} tokens at most")


def identity_of(checkpoint: Path) -> str:
    """A hash of all that a checkpoint says it holds; whether it does, `load` finds out."""
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def position_of(checkpoint: Path) -> tuple[int, int]:
    """The step and the epoch after which a sound checkpoint was made."""
    position = json.loads((checkpoint / "state.json").read_text())["position"]
    return int(position["step"]), int(position["epoch"])
