"""What the stage before the training leaves in a run's folder, and when another run may use it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wmtp.config.flatten import flat
from wmtp.config.moved_targets import load_run_config
from wmtp.config.schema import plain, stage_config
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import PRETRAIN

DECISIVE = ("pretrain", "model", "data", "seed")
"""Keys of the stage's config that a finished or interrupted stage is bound to."""


def stage_record(config: DictConfig) -> dict[str, Any]:
    """The resolved config of the stage, with its own keys under `pretrain`."""
    return plain(stage_config(config)) | {"pretrain": plain(config.pretrain)}


def write_record(folder: Path, config: DictConfig) -> None:
    """Write the stage's config.yaml."""
    (folder / PRETRAIN).mkdir(exist_ok=True)
    replace_atomically(folder / PRETRAIN / "config.yaml", OmegaConf.to_yaml(stage_record(config)).encode())


def read_record(folder: Path) -> dict[str, Any]:
    """The stage's config.yaml of a run.

    Raises:
        InputError: the run has none.
    """
    path = folder / PRETRAIN / "config.yaml"
    if not path.exists():
        raise InputError(f"{path}: is missing; {folder} is no run with a stage before its training")
    record = OmegaConf.to_container(load_run_config(path))
    assert isinstance(record, dict)
    return {str(key): value for key, value in record.items()}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, which says that the stage is finished."""
    replace_atomically(folder / PRETRAIN / "result.json", encode_json(result))


def read_result(folder: Path) -> dict[str, Any] | None:
    """How the stage of a run ended; None if it has not."""
    path = folder / PRETRAIN / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def require_unchanged(folder: Path, config: DictConfig) -> None:
    """Raises `InputError` where a resumed run asks for another stage than the one it began, and has not said so."""
    if read_result(folder) is None and any(folder.glob("checkpoints/step_*/manifest.json")):
        raise InputError(f"{folder}: its training has begun without a stage before it; set algo and pretrain back")
    if config.pretrain.get("reuse") is not None or not (folder / PRETRAIN / "config.yaml").exists():
        return
    keys = tuple(key for key in DECISIVE if key not in config.resume_override)
    before, now = _settings(read_record(folder), keys), _settings(stage_record(config), keys)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if key != "pretrain.reuse"]
    if changed:
        lines = [f"  {key}: was {before.get(key)}, is now {now.get(key)}" for key in changed]
        raise InputError("\n".join(["The stage before the training has begun with other settings:", *lines]))


def require_same_stage(source: Path, config: DictConfig) -> dict[str, Any]:
    """The result of another run's finished stage.

    Raises:
        InputError: it has none, or one of another kind or with another model.
    """
    result, record, wanted = read_result(source), read_record(source), stage_record(config)
    if result is None:
        raise InputError(f"pretrain.reuse={source}: that run's stage before the training is not finished")
    theirs, ours = (
        flat({"model": stage["model"], "kind": stage["pretrain"]["_target_"]}) for stage in (record, wanted)
    )
    changed = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if changed:
        lines = [f"  {key}: there {theirs.get(key)}, here {ours.get(key)}" for key in changed]
        raise InputError("\n".join([f"pretrain.reuse={source}: that run has another stage:", *lines]))
    return result


def take_over(source: Path, folder: Path, config: DictConfig) -> None:
    """Copy the finished stage of another run into this one.

    Raises:
        InputError: there is none that fits.
    """
    result = require_same_stage(source, config)
    staged = folder / f".{PRETRAIN}-copy"
    shutil.rmtree(staged, ignore_errors=True)
    saved = Path(result["saved"]).relative_to(PRETRAIN)
    shutil.copytree(source / PRETRAIN / saved, staged / saved)
    if (source / PRETRAIN / "model").is_dir():
        shutil.copytree(source / PRETRAIN / "model", staged / "model")
    for name in ("config.yaml", "result.json", "value_head.safetensors"):
        if (source / PRETRAIN / name).exists():
            shutil.copy(source / PRETRAIN / name, staged / name)
    os.replace(staged, folder / PRETRAIN)


def _settings(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Some keys of a config as one level of dotted keys."""
    return flat({key: record.get(key) for key in keys})
