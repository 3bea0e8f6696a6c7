"""Conversion of command-line arguments to Hydra overrides."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from wmtp.config.groups import is_group
from wmtp.config.moved_targets import current_override
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, ConfigIssue, validate_value
from wmtp.config.trust import saved_override_issues
from wmtp.errors import InputError
from wmtp.runtime.run_dir import SAVED_OVERRIDES
from wmtp.runtime.untrusted_files import require_inside

NOT_SAVED = ("resume", "resume_override", "dry_run")
"""Keys of overrides that apply to only one start of a run. They are ignored when the run is resumed."""
TEXT, ANY_BYTES = "text", "surrogateescape"
OmegaConf.register_new_resolver(TEXT, lambda code: bytes.fromhex(code[1:]).decode(errors=ANY_BYTES), replace=True)


def quote(value: object) -> str:
    """Return a value as a string in quotes, so that Hydra parses it as exactly this text."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def chosen_run_dir(overrides: list[str]) -> Path | None:
    """Return the folder that the override `hydra.run.dir=…` chooses, or None if there is no such override."""
    chosen = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("hydra.run.dir=")]
    return Path(chosen[-1]) if chosen else None


def expand_argument(argument: str, raw_keys: Collection[str], aliases: Mapping[str, str]) -> str:
    """Convert a command-line argument to Hydra's syntax.

    An alias is replaced with the full key. The short form of a group choice is expanded. The values of `raw_keys` are
    hex-encoded, so that Hydra does not parse them.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key in raw_keys and value:
        code = value.encode(errors=ANY_BYTES).hex()  # hex digits have no special meaning in Hydra's grammar
        value = f"${{{TEXT}:x{code}}}"
    return expand_group_choice(f"{aliases.get(key, key)}={value}")


def expand_group_choice(argument: str) -> str:
    """Convert the short form of a group choice to Hydra's syntax. Return any other argument unchanged.

    The short form `algo.of=rho1` chooses the option `rho1` of the config group `algo/of`. The short form
    `pretrain.model=nano` chooses the option `nano` of the config group `model` for training stage 1.
    """
    key, _, value = argument.partition("=")
    if "." in key and is_group(key.replace(".", "/")):
        return f"{key.replace('.', '/')}={value}"
    outer, _, group = key.partition(".")
    if outer == "pretrain" and is_group(group) and (CONFIG_FOLDER / group / f"{value}.yaml").exists():
        # the files of the pretrain group already choose early_stopping; any other group must be added
        return f"{'' if group == 'early_stopping' else '+'}{group}@{key}={value}"
    return argument


def to_hydra_override(argument: str) -> str:
    """Add the prefix or the package without which Hydra would not accept an override.

    `key=value` becomes `++key=value`. Without the prefix, Hydra would stop at the first unknown key, but the config
    check reports all errors together. `experiment=name` becomes `experiment@_global_=name`, because the experiment
    files contain no package directive.
    """
    key = argument.partition("=")[0]
    if key == "experiment":
        return argument.replace("experiment=", "experiment@_global_=", 1)
    if "=" not in argument or key.startswith(("-", "~", "hydra")) or is_group(key.lstrip("+").split("@")[0]):
        return argument
    return f"++{argument.lstrip('+')}"


def parse_overrides(arguments: list[str], issues: list[ConfigIssue]) -> list[Override]:
    """Parse arguments and return the valid Hydra overrides. Append an issue to `issues` for each invalid argument."""
    parser, overrides = OverridesParser.create(), []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            issues.append(ConfigIssue(argument, "", "is not an override; write key=value, or group=option"))
            continue
        if override.is_sweep_override():
            problem = "several values need a sweep: add -m, or quote the value"
            issues.append(ConfigIssue(override.key_or_group, "", problem))
        else:
            overrides.append(override)
    return overrides


def resumed_folder(arguments: list[str], key: str = "resume") -> Path | None:
    """Return the folder that the argument `resume=…` names, or None if there is no such argument."""
    named = [a.partition("=")[2].strip("'\"") for a in arguments if a.lstrip("+").startswith(f"{key}=")]
    return Path(named[-1]) if named else None


def load_saved_overrides(arguments: list[str]) -> list[str]:
    """Return the saved overrides of the run that the argument `resume=…` names, with the current names of their keys.

    If there is no such argument or the run has no saved overrides, return an empty list. A later check reports an error
    if the folder is wrong.

    Raises:
        InputError: the file of saved overrides is damaged, or a file of the run leads out of the run's folder.
        ConfigError: a saved override is not allowed.
    """
    folder = resumed_folder(arguments)
    if folder is None or not (folder / SAVED_OVERRIDES).exists():
        return []
    require_inside(folder)
    try:
        content = validate_value(list[str], json.loads((folder / SAVED_OVERRIDES).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / SAVED_OVERRIDES}: is not a list of overrides: {error}") from error
    saved = [current_override(text) for text in content if text.lstrip("+").partition("=")[0] not in NOT_SAVED]
    if issues := list(saved_override_issues(saved, arguments)):
        raise ConfigError(issues)
    return saved
