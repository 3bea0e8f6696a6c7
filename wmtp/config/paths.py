"""Absolute paths in configs, so that the config of a run names the same files for a command in another folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from wmtp.config.flatten import flatten
from wmtp.config.schema import Parameter, schema
from wmtp.config.targets import locate
from wmtp.config.values import validate_value
from wmtp.errors import refuse_odd_content
from wmtp.field_types import is_input_path
from wmtp.runtime.run_dir import SWEEP
from wmtp.runtime.untrusted_files import parse_yaml


def absolute_paths(config: DictConfig, base: Callable[[str], Path]) -> dict[str, Path]:
    """Return the absolute form of every relative input path in a config, by its dotted key.

    `base` returns the folder in which the path of a key starts.
    """
    found = {}
    for key, parameter, text in _texts(config, config, ""):
        if not is_input_path(parameter.annotation) or Path(text).is_absolute():
            continue
        try:
            is_path = isinstance(validate_value(parameter.annotation, text), Path)  # false for algo.reference=initial
        except ValidationError:  # the path may exist in `base`
            is_path = True
        if is_path:
            found[key] = base(key) / text
    return found


def started_in(folder: Path) -> Path | None:
    """Return the working directory in which the run or sweep in a folder was started, or None if it is not recorded."""
    path, recorded = folder / ".hydra" / "hydra.yaml", None
    if path.exists():
        with refuse_odd_content(path):
            recorded = flatten(parse_yaml(path)).get("hydra.runtime.cwd")
    elif (path := folder / SWEEP).exists():
        with refuse_odd_content(path):
            recorded = json.loads(path.read_bytes()).get("cwd")
    return None if recorded is None else Path(str(recorded))


def with_start_paths(config: DictConfig, folder: Path) -> DictConfig:
    """Return the config of the run in a folder with absolute paths.

    A relative path starts at the working directory in which the run was started. If the run does not record this
    directory, the config is returned unchanged.
    """
    if (start := started_in(folder)) is not None:
        for key, path in absolute_paths(config, lambda key: start).items():
            OmegaConf.update(config, key, str(path))
    return config


def _texts(node: DictConfig, like: DictConfig, key: str) -> Iterator[tuple[str, Parameter, str]]:
    """Yield the key, the parameter and the value of each parameter in a config node whose value is text.

    A node without a `_target_` has the one of the node `like`. For example, `pretrain.data` may change a key of `data`.
    """
    try:
        parameters = schema(locate(str(node.get("_target_", like.get("_target_")))))
    except ValueError:
        parameters = {}  # a check of the config reports wrong targets
    for name in map(str, node):
        if name not in node or OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        value, path = node[name], f"{key}{name}"
        if isinstance(value, DictConfig):
            other = like if path == "pretrain" else like.get(name)
            yield from _texts(value, other if isinstance(other, DictConfig) else OmegaConf.create(), f"{path}.")
        elif isinstance(value, str) and name in parameters:
            yield path, parameters[name], value
