"""Read and write the config and the result of stage 1, and check that they match the config of a run that uses them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wmtp.checkpoint.listing import checkpoint_path
from wmtp.config.flatten import flatten
from wmtp.config.paths import with_start_paths
from wmtp.config.schema import build, schema, stage_config, to_plain
from wmtp.config.targets import locate
from wmtp.config.trust import load_run_config
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import PRETRAIN
from wmtp.runtime.untrusted_files import require_inside

FIXED_KEYS = ("pretrain", "model", "data", "seed")
"""Keys of the stage 1 config whose values must not change once stage 1 has begun."""


def resolved_stage_config(config: DictConfig) -> dict[str, Any]:
    """Return the config of stage 1 with all interpolations resolved, as plain values.

    Its key `pretrain` contains the group `pretrain` of the run's config.
    """
    return to_plain(stage_config(config)) | {"pretrain": to_plain(config.pretrain)}


def write_stage_config(folder: Path, config: DictConfig) -> None:
    """Write the config of stage 1 to its config.yaml in the run's folder."""
    (folder / PRETRAIN).mkdir(exist_ok=True)
    replace_atomically(folder / PRETRAIN / "config.yaml", OmegaConf.to_yaml(resolved_stage_config(config)).encode())


def read_stage_config(folder: Path) -> dict[str, Any]:
    """Read the config of stage 1 from its config.yaml in a run's folder.

    Raises:
        InputError: the file does not exist.
    """
    path = folder / PRETRAIN / "config.yaml"
    if not path.exists():
        raise InputError(f"{path}: is missing; {folder} is not the folder of a run with stage 1 (pretrain)")
    record = OmegaConf.to_container(with_start_paths(load_run_config(path), folder))
    assert isinstance(record, dict)
    return {str(key): value for key, value in record.items()}


def write_stage_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of stage 1 to its result.json in the run's folder. This file marks stage 1 as finished."""
    replace_atomically(folder / PRETRAIN / "result.json", encode_json(result))


def read_stage_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of stage 1 from a run's folder, or None if stage 1 is not finished.

    Raises:
        InputError: the file is damaged, or the checkpoint that it names is not one of stage 1.
    """
    path = folder / PRETRAIN / "result.json"
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        checkpoint_path(result["saved"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: {error}") from error
    return result


def require_unchanged(folder: Path, config: DictConfig) -> None:
    """Check that a resumed run has the same stage 1 settings as before, except for those that `resume_override` names.

    Raises:
        InputError: a setting of stage 1 has changed, or the run was started without a stage 1 and now has one.
    """
    if read_stage_result(folder) is None and any(folder.glob("checkpoints/step_*/manifest.json")):
        raise InputError(f"{folder}: its training has begun without a stage 1; restore the original algo and pretrain")
    if config.pretrain.get("reuse") is not None or not (folder / PRETRAIN / "config.yaml").exists():
        return
    keys = tuple(key for key in FIXED_KEYS if key not in config.resume_override)
    before, now = _settings(read_stage_config(folder), keys), _settings(resolved_stage_config(config), keys)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if key != "pretrain.reuse"]
    if changed:
        lines = [f"  {key}: was {before.get(key)}, is now {now.get(key)}" for key in changed]
        old = " ".join(f"{key}={before[key]}" for key in changed if before.get(key) is not None)
        remedy = f"To continue the run, restore the settings: {old}"
        raise InputError("\n".join(["Stage 1 has begun with other settings:", *lines, remedy]))


def require_same_stage(source: Path, config: DictConfig) -> dict[str, Any]:
    """Check that another run has finished a stage 1 that matches the config, and return the result of that stage.

    `source` is the folder of the other run.

    Raises:
        InputError: the other run has no finished stage 1, or the class, its options or the model of its stage 1 differ
            from those in `config`.
    """
    require_inside(source)
    result, reused, current = read_stage_result(source), read_stage_config(source), resolved_stage_config(config)
    if result is None:
        raise InputError(f"pretrain.reuse={source}: stage 1 of that run is not finished")
    compares_start = "start" in build(config.algo).references
    reused, current = (flatten(_compared_settings(stage, compares_start)) for stage in (reused, current))
    changed = sorted(key for key in reused.keys() | current.keys() if reused.get(key) != current.get(key))
    if changed:
        target = "pretrain._target_"  # stages of two classes have different options
        changed = [target] if target in changed else changed
        lines = [f"  {key}: {reused.get(key)} in that run, {current.get(key)} in this run" for key in changed]
        raise InputError("\n".join([f"pretrain.reuse={source}: stage 1 of that run differs:", *lines]))
    return result


def _compared_settings(stage: dict[str, Any], compares_start: bool) -> dict[str, Any]:
    """Return the settings on which the use of a trained stage 1 depends, but not those of its training.

    `stage` is the config of stage 1. If `compares_start` is true, the algorithm compares its model with the model
    before the training, whose random weights depend on the seed.
    """
    options = stage.get("pretrain") or {}
    own = schema(locate(str(options.get("_target_")))).keys() - {"reuse", "save_value_head", "language_model_coef"}
    settings = {"model": stage.get("model"), "pretrain": {k: v for k, v in options.items() if k in {*own, "_target_"}}}
    return settings | ({"seed": stage.get("seed")} if compares_start and options.get("start") is None else {})


def copy_stage(source: Path, folder: Path, config: DictConfig) -> None:
    """Copy the finished stage 1 of another run to this run's folder.

    `source` is the folder of the other run, and `folder` is that of this run.

    Raises:
        InputError: the other run has no finished stage 1, or its stage 1 does not match the config.
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
    """Return the sections of a config that `keys` names, as one flat dictionary with dotted keys."""
    return flatten({key: record.get(key) for key in keys})
