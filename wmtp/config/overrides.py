"""Normalization of command-line arguments into Hydra overrides: short forms, raw text, saved overrides."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from wmtp.config.groups import is_group
from wmtp.config.schema import CONFIG_FOLDER, ConfigIssue
from wmtp.runtime.run_dir import SAVED_OVERRIDES

NOT_SAVED = ("resume", "resume_override", "dry_run")
"""Overrides that apply to one start of a run, and are not saved with the run."""
TEXT, ANY_BYTES = "text", "surrogateescape"
OmegaConf.register_new_resolver(TEXT, lambda code: bytes.fromhex(code[1:]).decode(errors=ANY_BYTES), replace=True)


def quote(value: object) -> str:
    """Return a value as a quoted string that Hydra's grammar reads back unchanged."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def chosen_run_dir(overrides: list[str]) -> Path | None:
    """Return the folder in `hydra.run.dir=`, or None."""
    chosen = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("hydra.run.dir=")]
    return Path(chosen[-1]) if chosen else None


def expand_argument(argument: str, raw_keys: Collection[str], aliases: Mapping[str, str]) -> str:
    """Return an argument in Hydra's syntax: aliases become full keys, and values of `raw_keys` are hex-encoded."""
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key in raw_keys and value:
        code = value.encode(errors=ANY_BYTES).hex()  # hex digits have no special meaning in Hydra's grammar
        value = f"${{{TEXT}:x{code}}}"
    return expand_group_choice(f"{aliases.get(key, key)}={value}")


def expand_group_choice(argument: str) -> str:
    """Return an override in Hydra's syntax if it chooses a group option in the shorter syntax of wmtp.

    `algo.of=rho1` chooses from the group `algo/of`; `pretrain.model=nano` chooses an option of `model` for stage 1.
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
    """Return an override as Hydra needs it.

    `key=value` becomes `++key=value`, so that unknown keys reach the config check, which reports all errors together.
    `experiment=name` becomes `experiment@_global_=name`, because the experiment files contain no package directive.
    """
    key = argument.partition("=")[0]
    if key == "experiment":
        return argument.replace("experiment=", "experiment@_global_=", 1)
    if "=" not in argument or key.startswith(("-", "~", "hydra")) or is_group(key.lstrip("+").split("@")[0]):
        return argument
    return f"++{argument.lstrip('+')}"


def parse_overrides(arguments: list[str], issues: list[ConfigIssue]) -> list[Override]:
    """Return the arguments that are valid Hydra overrides, and append an issue for each other argument."""
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


def load_saved_overrides(arguments: list[str]) -> list[str]:
    """Return the saved overrides of the run in `resume=`; an empty list for a wrong folder, which is checked later."""
    resume = next((a.partition("=")[2] for a in reversed(arguments) if a.lstrip("+").startswith("resume=")), None)
    path = Path(str(resume).strip("'\"")) / SAVED_OVERRIDES
    if resume is None or not path.exists():
        return []
    saved: list[str] = json.loads(path.read_text())
    return [text for text in saved if text.lstrip("+").partition("=")[0] not in NOT_SAVED]
