"""Checks of everything that the folder of a run contains, because the folder may come from a stranger.

The folder may have been copied from another machine or downloaded from a bucket. Therefore it may not decide which code
is executed, whether programs are isolated, or where credentials and results are sent, and no path in it may lead out of
it. docs/security.md describes who is trusted with what.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp.config.moved_targets import update_config
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, ConfigIssue
from wmtp.config.targets import group_kind, locate, parameter_kinds
from wmtp.errors import InputError
from wmtp.runtime.destinations import known_destinations, normalize, remember_destinations
from wmtp.runtime.untrusted_files import read_yaml

DESTINATIONS = ("tracking.uri", "checkpoint.s3.url", "checkpoint.s3.endpoint_url", "pretrain.checkpoint.s3.url",
                "pretrain.checkpoint.s3.endpoint_url")  # fmt: skip
"""Config keys that decide where credentials, signed requests and results are sent."""
OBJECT_KEY = re.compile(r"_[a-z]+_")
"""Pattern of the keys with which Hydra describes an object, such as `_target_` and `_args_`."""
KEY_REFERENCE = re.compile(r"\$\{[\w.]+\}")
"""Pattern of an interpolation that only refers to another key. It cannot read the environment or call a function."""
NOTHING = re.compile(r"(?!)")
"""Pattern that matches no text."""


def load_run_config(path: Path) -> DictConfig:
    """Load the config.yaml of a run. Targets and keys of an earlier version get their current names.

    Raises:
        InputError: the file is not a config of plain values.
        ConfigError: an object is described where none belongs, or its class is not one that belongs there.
    """
    try:
        config = OmegaConf.create(read_yaml(path))
        content = update_config(OmegaConf.to_container(config))
        if not isinstance(config, DictConfig):
            raise InputError(f"{path}: is not a config")
        issues = [*_interpolations(content, NOTHING), *placement_issues(content)]
    except (OSError, ValueError, AssertionError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: is not a readable config: {' '.join(str(error).split())}") from error
    if issues:
        raise ConfigError([ConfigIssue(f"{path}: {each.key}", each.value, each.problem) for each in issues])
    checked = OmegaConf.create(content)
    assert isinstance(checked, DictConfig)
    return checked


def placement_issues(value: Any, key: str = "", kind: type | None = None) -> Iterator[ConfigIssue]:
    """Yield an issue for each object that a config describes in a wrong place or with a wrong class.

    Args:
        value: a config, or a value inside it, as plain dictionaries and lists.
        key: dotted key of the value.
        kind: class of the object that the value describes. If it is None, the value must be plain.
    """
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from placement_issues(item, f"{key}[{index}]")
    if not isinstance(value, dict):
        return
    children: dict[str, type] = {}
    if object_keys := [name for name in value if OBJECT_KEY.fullmatch(str(name))]:
        path = f"{key}.{object_keys[0]}".lstrip(".")
        target = value.get("_target_")
        if object_keys != ["_target_"] or (kind is None and key):
            yield ConfigIssue(path, str(value[object_keys[0]]), "a plain value belongs here, not an object")
            return
        try:
            children = parameter_kinds(locate(str(target), kind))
        except ValueError as error:
            yield ConfigIssue(path, str(target), str(error))
            if key:
                return
    for name, item in value.items():
        group = group_kind(str(name)) if key in ("", "pretrain") else None
        yield from placement_issues(item, f"{key}.{name}".lstrip("."), group or children.get(str(name)))


def saved_override_issues(overrides: Iterable[str], typed: Iterable[str]) -> Iterator[ConfigIssue]:
    """Yield an issue for each saved override of a run that changes Hydra itself, or that reads the environment.

    Saved overrides that `typed`, the overrides of the user, replaces are left out.
    """
    parser, replaced = OverridesParser.create(), _keys(typed)
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            continue  # reported when all overrides are parsed
        if override.key_or_group in replaced:
            continue
        names = (override.key_or_group, override.package or "")
        if any(re.split(r"[./]", name)[0] == "hydra" for name in names):
            yield ConfigIssue("resume", text, "the saved overrides of a run may not change Hydra's own settings")
            continue
        for issue in _interpolations({override.key_or_group: override.value()}, KEY_REFERENCE):
            problem = "is a saved override that reads more than other keys; if you trust it, add it to this command"
            yield ConfigIssue(issue.key, issue.value, problem)


def unconfirmed_issues(config: DictConfig, typed: Iterable[str], source: Path) -> Iterator[ConfigIssue]:
    """Yield an issue for each setting of `source`, a run's folder, that takes effect only if the user confirms it.

    These are the sandbox, if it is switched off, and destinations to which this user has not sent data before.

    Args:
        config: the config that results from the overrides of the run and of the user.
        typed: the overrides of the user. A key in them is confirmed.
        source: the folder that contains the other overrides.
    """
    problems = dict.fromkeys(unknown_destinations(config), f"is a setting of {source}, but you have sent no data there")
    if config.get("sandbox") == "none":
        problems["sandbox"] = f"is a setting of {source}, with which programs run unprotected"
    cache = config.get("cache_dir")
    if cache not in (None, default_cache()) and os.path.abspath(str(cache)) not in known_destinations():
        problems["cache_dir"] = f"is a setting of {source}, and the run would write there and use the files there"
    for key in problems.keys() - _keys(typed):
        value = str(OmegaConf.select(config, key))
        yield ConfigIssue(key, value, f"{problems[key]}; if you trust it, add {key}={value} to this command")


def unknown_destinations(config: DictConfig) -> Iterator[str]:
    """Yield the keys in `DESTINATIONS` whose values this user has not used before."""
    known = known_destinations()
    for key in DESTINATIONS:
        value = OmegaConf.select(config, key)
        if value is not None and normalize(str(value)) not in known:
            yield key


def default_cache() -> str:
    """Return the default of the config key `cache_dir`."""
    return str(OmegaConf.select(OmegaConf.load(CONFIG_FOLDER / "train.yaml"), "cache_dir"))


def remember(config: DictConfig) -> None:
    """Record that this user sends data to the destinations in a config."""
    values = (OmegaConf.select(config, key) for key in DESTINATIONS)
    remember_destinations([str(value) for value in values if value is not None] + [os.path.abspath(config.cache_dir)])


def _interpolations(value: Any, allowed: re.Pattern[str], key: str = "") -> Iterator[ConfigIssue]:
    """Yield an issue for each interpolation in a value that does not match `allowed`."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _interpolations(item, allowed, f"{key}.{name}".lstrip("."))
    elif "${" in allowed.sub("", text := str(value)):
        yield ConfigIssue(key, text, "is an interpolation, but the files of a run contain plain values")


def _keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys of overrides, without their prefixes."""
    return {text.lstrip("+").partition("=")[0] for text in overrides}
