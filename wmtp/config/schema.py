"""Checks of configs against constructor signatures, and construction of objects from configs.

**The constructor's signature is the schema.** A config node is a dictionary inside a config. The `_target_`
of a node is the path of a class or function. The other keys of the node are the keyword-only parameters (after the
`*`) of this class or function, whose annotations define the types and ranges of the values. Parameters before the `*`
are objects that the command passes, such as `vocab_size` of a model. All errors in a config are found before any
object is built.
"""

import copy
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from wmtp.config.flatten import flatten
from wmtp.config.moved_targets import current_key
from wmtp.config.targets import kind_of, locate
from wmtp.config.values import as_typed, convert_value, format_problem, validate_value
from wmtp.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDER = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""Folder of the config files. It is inside the package if the package is installed, and beside it otherwise."""
PASSED_TO_TORCH = frozenset({"params", "optimizer"})
"""Parameters of torch's optimizers and schedulers that are objects passed by the command, not config keys."""
CREDENTIALS = re.compile(r"://\S*@")
"""Pattern of a user name and password in a URL. Text that matches the pattern is not printed."""
NOTHING_TYPED: Mapping[str, str] = MappingProxyType({})
WHOLE_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True, order=True)
class ConfigIssue:
    """One error in a config. The field `problem` explains the error and how to correct it."""

    key: str
    value: str
    problem: str

    def __str__(self) -> str:
        text = f"{self.key}{f'={self.value}' if self.value else ''}: {self.problem}"
        return CREDENTIALS.sub("://…@", text)


class ConfigError(InputError):
    """An exception that contains all errors in one config."""

    def __init__(self, issues: Iterable[ConfigIssue]) -> None:
        self.issues = sorted(set(issues))
        count = f"{len(self.issues)} error{'s' if len(self.issues) > 1 else ''}"
        lines = [f"The config has {count}; nothing was done.", *(f"  {issue}" for issue in self.issues)]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class CheckedConfig:
    """A config that has been checked, with the issues that were found."""

    config: DictConfig
    """The composed config, completed with default values that depend on other inputs."""
    issues: list[ConfigIssue]
    inputs: Any = None
    """Objects that were built or read for the check, and that the job uses. None if there are issues."""


@dataclass(frozen=True)
class Parameter:
    """The type of a config key, and whether the key is required."""

    annotation: Any
    required: bool


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Return a config as dictionaries and lists, with all interpolations resolved."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint for an unknown word. It names the most similar known word, or all of them if none is similar.

    `prefix` is the beginning of a dotted key whose end is `word`. If the key had this name in an earlier version, the
    hint contains its current name.
    """
    if (current := current_key(prefix + word)) != prefix + word:
        return f"did you mean {current}?"
    known = sorted(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {prefix}{matches[0]}?"
    return f"valid: {', '.join(known)}" if known else "no key is valid here"


@cache
def schema(target: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the config keys that a class or function accepts. The result must not be changed.

    The config keys of a class of torch are all its parameters except `PASSED_TO_TORCH`. The config keys of any other
    class or function are its keyword-only parameters.
    """
    signature = inspect.signature(target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    from_torch = target.__module__.startswith("torch.")
    return {
        name: Parameter(hints.get(name, Any), parameter.default is parameter.empty)
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or (from_torch and name not in PASSED_TO_TORCH)
    }


def is_node(value: object) -> bool:
    """Return whether a config value is a node with a `_target_`."""
    return isinstance(value, DictConfig) and "_target_" in value


def iter_nodes(config: DictConfig, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the dotted key and the content of every node with a `_target_` inside `config`.

    `key` is the dotted key of `config` itself.
    """
    for name in typing.cast(list[str], list(config)):  # a key may be a number, as in {1: 0.2}
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        value, path = config[name], f"{key}.{name}" if key else str(name)
        if isinstance(value, DictConfig):
            if is_node(value):
                yield path, value
            yield from iter_nodes(value, path)


def node_issues(
    node: DictConfig, key: str, extra: Mapping[str, Parameter] | None = None, typed: Mapping[str, str] = NOTHING_TYPED
) -> Iterator[ConfigIssue]:
    """Convert the values of one config node to their annotated types, and yield the errors in it.

    The converted values replace those in `node`, so that everything that reads the config afterwards gets them. Nodes
    inside this node are neither converted nor checked.

    Args:
        node: a node with a `_target_`.
        key: dotted key of the node.
        extra: parameters that the node may have in addition to those in the signature of its target.
        typed: values as the user typed them, by dotted key. They are used for keys whose value must be text, because
            Hydra reads `2024_11_29` as a number.
    """
    target = str(node.get("_target_"))
    try:
        parameters = schema(locate(target)) | dict(extra or {})
    except ValueError as error:
        yield ConfigIssue(f"{key}._target_".lstrip("."), target, str(error))
        return
    prefix = f"{key}." if key else ""
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
    for name in raw:
        if name == "_target_" or name in parameters:
            continue
        nested = [] if key else [path for path in flatten(raw) if path.endswith(f".{name}") and path not in raw]
        hint = did_you_mean(name, parameters, prefix) if not nested else f"did you mean {' or '.join(nested)}?"
        yield ConfigIssue(f"{prefix}{name}", str(raw[name]), f"unknown key; {hint}")
    for name, parameter in parameters.items():
        path = f"{prefix}{name}"
        if name not in node or OmegaConf.is_missing(node, name):
            if parameter.required:
                yield ConfigIssue(path, "", f"missing; set it with {path}=…")
            continue
        try:
            value = node[name]
            if is_node(value) and kind_of(parameter.annotation) is not None:
                continue
            content = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except InterpolationToMissingValueError:
            continue  # reported for the key that it refers to
        except OmegaConfBaseException as error:
            yield ConfigIssue(path, "", str(error).splitlines()[0])
            continue
        try:
            converted = convert_value(parameter.annotation, content, path, typed)
        except ValidationError as error:
            reference = WHOLE_INTERPOLATION.fullmatch(str(raw[name]))  # report the key that a user would set
            shown = as_typed(content, path, typed) if type(content) in (int, float) else content
            yield ConfigIssue(reference[1] if reference else path, str(shown), format_problem(error))
            continue
        if repr(converted) != repr(content):  # unlike ==, it distinguishes 1, 1.0 and True
            node[name] = converted


def build(node: DictConfig, target: Callable[..., Any] | None = None, **available: object) -> Any:
    """Build the object that a config node describes, including the objects of the nodes inside it.

    All objects that a config describes are built by this function. An object inside another one is built only for a
    parameter that takes an object of wmtp. Config values are converted to the types in the
    annotations of the target's parameters.

    Args:
        node: a node with a `_target_`, or any node if `target` is given. Keys that are not parameters are ignored.
        target: class or function to call. If it is None, the `_target_` of the node is called.
        available: objects by parameter name. Each object is passed to every target that has a parameter of its name.

    Returns:
        The object that the target returned.
    """
    target = target or locate(str(node["_target_"]))
    parameters = schema(target)
    values = {}
    for name, parameter in parameters.items():
        if name not in node:
            continue
        value, kind = node[name], kind_of(parameter.annotation)
        if is_node(value) and kind is not None:
            values[name] = build(value, locate(str(value["_target_"]), kind), **available)
        else:
            content = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            values[name] = validate_value(parameter.annotation, content)
    given = {name: available[name] for name in inspect.signature(target).parameters if name in available}
    return target(**given, **values)


def stage_keys(config: DictConfig) -> list[str]:
    """Return the keys in the node `pretrain` that replace keys of the config and are not its own settings."""
    own = {*schema(locate(str(config.pretrain["_target_"]))), *{"_target_"}}
    return [key for key in map(str, config.pretrain) if key not in own]


def copy_values(source: DictConfig, target: DictConfig, keys: Iterable[Any]) -> None:
    """Copy the values of keys from a config to another one that has the same keys and equal values of other types."""
    for key in keys:
        old, new = target[key], source[key]
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            copy_values(new, old, list(old))
        elif repr(old) != repr(new):
            target[key] = new


def stage_config(config: DictConfig) -> DictConfig:
    """Return the config of training stage 1. It is a copy of the config of stage 2, changed by the node `pretrain`.

    The keys in `pretrain` replace the same keys of `config`. Only the parameters of the `_target_` of `pretrain` are
    not copied, because they are settings of the stage itself.
    """
    changes = {key: value for key, value in to_plain(config.pretrain).items() if key in stage_keys(config)}
    base = copy.deepcopy(config)
    OmegaConf.set_struct(base, False)
    for key, value in changes.items():
        if isinstance(value, dict) and "_target_" in value:
            base[key] = None  # replace the object instead of merging its keys
    merged = OmegaConf.merge(base, {"pretrain": None, "resume": None}, changes)
    assert isinstance(merged, DictConfig)
    return merged
