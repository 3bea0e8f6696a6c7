"""Checks a composed config against the signatures it will call, and builds objects from it.

**The constructor's signature is the schema.** A node with a `_target_` may hold exactly the
parameters that its target takes after the `*`; their annotations say type and range. Parameters
before the `*` are objects that the command hands over (a model's `vocab_size`, an optimizer's
`params`). Every fault is found before anything is built.
"""

import copy
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from wmtp.config.moved_targets import current_target
from wmtp.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDER = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""In what is installed, the configs lie inside the package."""
ALLOWED_TARGETS = ("wmtp.", "torch.optim.", "torch.optim.lr_scheduler.")
HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_"})
GIVEN_TO_TORCH = frozenset({"params", "optimizer"})
"""What torch's optimizers and schedulers are handed by the command; they have no `*`."""
CREDENTIALS = re.compile(r"://\S*@")
"""User and password in an address; they are never printed."""
WHOLE_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong with a config: where, what stands there, what is allowed."""

    key: str
    value: str
    problem: str

    def __str__(self) -> str:
        text = f"{self.key}{f'={self.value}' if self.value else ''}: {self.problem}"
        return CREDENTIALS.sub("://…@", text)


class ConfigError(InputError):
    """All faults of one config."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = sorted(set(faults))
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        super().__init__("\n".join([f"The config has {count}; nothing was done.", *(f"  {f}" for f in self.faults)]))


@dataclass(frozen=True)
class Parameter:
    """One key that a node may hold."""

    annotation: Any
    required: bool


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as dictionaries and lists, its references replaced by what they refer to."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint towards the nearest of the known words, or the list of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known here: {', '.join(known)}" if known else "nothing can be set here"


def locate(target: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names.

    Raises:
        ValueError: outside the allow-list, or nothing of that name.
    """
    target = current_target(target)
    if not target.startswith(ALLOWED_TARGETS):
        raise ValueError(f"a target must begin with one of {', '.join(ALLOWED_TARGETS)}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"nothing of that name: {error}") from error
    if not callable(found):
        raise ValueError("is not a class or function")
    return typing.cast(Callable[..., Any], found)


def schema(target: Callable[..., Any]) -> dict[str, Parameter]:
    """The keys that a node of this target may hold: its keyword-only parameters, or all of torch's."""
    signature = inspect.signature(target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    from_torch = target.__module__.startswith("torch.")
    return {
        name: Parameter(hints.get(name, Any), parameter.default is parameter.empty)
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or (from_torch and name not in GIVEN_TO_TORCH)
    }


def validated(annotation: Any, value: object) -> Any:
    """The value as its annotation wants it ("3" → 3, list → tuple, str → Path).

    Raises:
        ValidationError: it cannot be; the message says what is allowed.
    """
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the annotation is a model or dataclass with a config of its own
        adapter = TypeAdapter(annotation)
    result = adapter.validate_python(value)
    if isinstance(value, bool) and isinstance(result, (int, float)) and not isinstance(result, bool):
        return adapter.validate_python(str(value))  # pydantic reads True as 1; here it is a wrong type
    return result


def problem_of(error: ValidationError) -> str:
    """What is allowed, in one line."""
    messages = {e["msg"].removeprefix("Value error, ").replace("Input should be", "must be") for e in error.errors()}
    return "; ".join(sorted(messages))


def is_node(value: object) -> bool:
    """Whether a config value becomes an object."""
    return isinstance(value, DictConfig) and "_target_" in value


def holds_nodes(value: object) -> bool:
    """Whether objects are to be built somewhere inside a config value."""
    if isinstance(value, DictConfig):
        return is_node(value) or any(holds_nodes(value.get(k)) for k in value if not OmegaConf.is_missing(value, k))
    return isinstance(value, ListConfig) and any(holds_nodes(item) for item in value)


def nodes(config: DictConfig, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node with a `_target_` below `config`, with its dotted key."""
    for name in typing.cast(list[str], list(config)):  # a key may be a number, as in {1: 0.2}
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        value, path = config[name], f"{key}.{name}" if key else str(name)
        if isinstance(value, DictConfig):
            if is_node(value):
                yield path, value
            yield from nodes(value, path)


def node_faults(node: DictConfig, key: str, also: dict[str, Parameter] | None = None) -> Iterator[Fault]:
    """What is wrong with the keys of one node, given its target's signature (and `also` these)."""
    target = str(node.get("_target_"))
    try:
        parameters = schema(locate(target)) | (also or {})
    except ValueError as error:
        yield Fault(f"{key}._target_".lstrip("."), target, str(error))
        return
    prefix = f"{key}." if key else ""
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
    for name in raw:
        if name in HYDRA_KEYS or name in parameters:
            continue
        yield Fault(f"{prefix}{name}", str(raw[name]), f"unknown key; {did_you_mean(name, parameters, prefix)}")
    for name, parameter in parameters.items():
        path = f"{prefix}{name}"
        if name not in node or OmegaConf.is_missing(node, name):
            if parameter.required:
                yield Fault(path, "", f"missing; set it with {path}=…")
            continue
        try:
            value = node[name]
        except InterpolationToMissingValueError:
            continue  # the key that it refers to is missing, which is told of that
        except OmegaConfBaseException as error:
            yield Fault(path, "", str(error).splitlines()[0])
            continue
        if holds_nodes(value):
            continue
        content = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        try:
            validated(parameter.annotation, content)
        except ValidationError as error:
            reference = WHOLE_INTERPOLATION.fullmatch(str(raw[name]))  # blame the key that a user would set
            yield Fault(reference[1] if reference else path, str(content), problem_of(error))


def build(node: DictConfig, target: Callable[..., Any] | None = None, **available: object) -> Any:
    """The object of a node: the one place where the project instantiates from config.

    Values are converted to what the annotations ask for. Of the `available` objects, the target gets
    those that its signature names. A `target` given here takes the keys it knows from a larger node.
    """
    target = target or locate(str(node["_target_"]))
    parameters = schema(target)
    values = {}
    for name, parameter in parameters.items():
        if name not in node:
            continue
        if holds_nodes(node[name]):
            values[name] = build(node[name], None, **available)
        else:
            value = node[name]
            content = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            values[name] = validated(parameter.annotation, content)
    given = {name: available[name] for name in inspect.signature(target).parameters if name in available}
    return target(**given, **values)


def stage_config(config: DictConfig) -> DictConfig:
    """The config of the stage before: the training's, changed by what `pretrain` says besides its own keys."""
    own = schema(locate(str(config.pretrain["_target_"])))
    changes = {k: value for k, value in plain(config.pretrain).items() if k not in own and k not in HYDRA_KEYS}
    base = copy.deepcopy(config)
    OmegaConf.set_struct(base, False)
    for key, value in changes.items():
        if isinstance(value, dict) and "_target_" in value:
            base[key] = None  # another object, not some of its keys
    merged = OmegaConf.merge(base, {"pretrain": None, "resume": None}, changes)
    assert isinstance(merged, DictConfig)
    return merged
