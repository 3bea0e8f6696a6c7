"""Trained models: from a run's folder or a checkpoint to a model, its tokenizer and the config it was made with."""

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from wmtp.checkpoint.state import load_model
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.config import ConfigError, Fault, build, node_faults
from wmtp.data.tokenization import Tokenizer
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.runtime.hardware import Hardware

FROM_CONFIG = {"model": "wmtp.models.", "data.tokenizer": "wmtp.data.tokenization."}
"""What is made as a run's config.yaml says, and where it must come from: the file is input like any other."""


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


def read_config(path: Path) -> DictConfig:
    """The config.yaml of a run.

    Raises:
        InputError: it is missing, or its model or tokenizer is none of wmtp's or has faults.
    """
    if not path.exists():
        raise InputError(f"{path}: is missing; it says how the checkpoint's model is made")
    config = OmegaConf.load(path)
    faults: list[Fault] = []
    for key, origin in FROM_CONFIG.items():
        node = OmegaConf.select(config, key)
        if not isinstance(node, DictConfig) or not str(node.get("_target_")).startswith(origin):
            raise InputError(f"{path}: its {key} is none of wmtp's")
        faults += node_faults(node, key)
    if faults:
        raise ConfigError([Fault(f"{path}: {fault.key}", fault.value, fault.problem) for fault in faults])
    assert isinstance(config, DictConfig)
    return config


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
    try:
        load_model(model, snapshot.model)
    except RuntimeError as error:
        raise InputError(f"{checkpoint}: does not fit the model: {' '.join(str(error).split())}") from error
    return model.to(hardware.device)


def load_trained(path: Path, tokenizer: Tokenizer, hardware: Hardware) -> MtpModel:
    """The model of a run or checkpoint, made as the config.yaml beside it says; without its value head.

    Raises:
        InputError: one of the two is missing or damaged, or the tokenizer is another.
    """
    found = hardware.processes.from_main(lambda: [str(each) for each in find_checkpoint(path)])
    checkpoint, config_path = map(Path, found)
    model = build(read_config(config_path).model, vocab_size=tokenizer.vocab_size)
    return load_weights(checkpoint, model, tokenizer, hardware)


def identity_of(checkpoint: Path) -> str:
    """A hash of all that a checkpoint says it holds; whether it does, `load` finds out."""
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def position_of(checkpoint: Path) -> tuple[int, int]:
    """The step and the epoch after which a sound checkpoint was made."""
    position = json.loads((checkpoint / "state.json").read_text())["position"]
    return int(position["step"]), int(position["epoch"])
