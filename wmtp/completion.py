"""What Tab offers for a command's last word: its groups and their options, its keys and their values."""

import glob
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp.config import CONFIG_FOLDER
from wmtp.groups import STAGE_GROUPS, groups_of, is_group, offered
from wmtp.overrides import forced, parsed, plain

OPTIONS = ("-sc", "--shell-completion")
"""What a shell calls a command with, followed by install=…, uninstall=… or query=…"""


def is_asked_for(arguments: list[str]) -> bool:
    """Whether a shell asks what may follow."""
    return any(argument in OPTIONS for argument in arguments) and any(a.startswith("query=") for a in arguments)


def offers(line: str, command: str, short: Mapping[str, str], paths: Collection[str]) -> list[str]:
    """The words that may stand in the place of a line's last one.

    Args:
        line: from the command's name to the cursor.
        command: of which config.
        short: keys that users may type for longer ones.
        paths: keys that name a file or folder.
    """
    words = line.split()[1:]
    word = words.pop() if words and not line[-1].isspace() else ""
    bare = word.lstrip("+~")
    sign = word.removesuffix(bare)
    key, equals, value = bare.partition("=")
    config = composed(command, words, short)
    if equals:
        found = [f"{key}={each}" for each in values(config, command, key, value, {*paths, *short})]
    else:
        found = keys(config, command, key.rpartition(".")[0]) + [f"{each}=" for each in (*groups_of(command), *short)]
    return sorted({f"{sign}{each}" for each in found if each.startswith(bare)})


def composed(command: str, words: list[str], short: Mapping[str, str]) -> dict[str, Any]:
    """The config that the words before give, or the command's own where they make no sense yet."""
    overrides = [forced(plain(word, (), short)) for word in words if not word.startswith("-")]
    chosen = [override.input_line or "" for override in parsed(overrides, [])]
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            config = hydra.compose(command, chosen)
        except (HydraException, OmegaConfBaseException):
            config = hydra.compose(command)
    plain_config = OmegaConf.to_container(config)
    assert isinstance(plain_config, dict)
    return {str(key): value for key, value in plain_config.items()}


def select(config: dict[str, Any], key: str) -> Any:
    """What stands at a dotted key; None if nothing does."""
    node: Any = config
    for part in key.split(".") if key else ():
        node = node.get(part) if isinstance(node, dict) else None
    return node


def group_of(command: str, key: str) -> str | None:
    """The group that a key chooses from, in any of its spellings."""
    outer, _, inner = key.partition(".")
    nested = key.replace(".", "/")
    if key in groups_of(command) or ("." in key and is_group(nested)):
        return nested
    return inner if outer == "pretrain" and is_group(inner) else None


def keys(config: dict[str, Any], command: str, before: str) -> list[str]:
    """The keys below a key: `key.` where others are inside, `key=` where a value or an option can be set."""
    node = select(config, before)
    if not isinstance(node, dict):
        return []
    found = [f"pretrain.{group}=" for group in STAGE_GROUPS] if before == "pretrain" else []
    for name in node:
        key, inside = f"{before}.{name}".lstrip("."), node[name]
        if str(name).startswith("_"):
            continue
        if isinstance(inside, dict):
            found.append(f"{key}.")
        if not isinstance(inside, dict) or group_of(command, key):
            found.append(f"{key}=")
    return found


def values(config: dict[str, Any], command: str, key: str, value: str, paths: Collection[str]) -> list[str]:
    """What a key can be set to: options, files, or what it is set to now."""
    if group := group_of(command, key):
        return offered(group)
    now = select(config, key)
    if key in paths or (value and not isinstance(now, (bool, int, float))):
        return files(value)
    if isinstance(now, bool):
        return ["false", "true"]
    return ["null" if now is None else str(now)] if isinstance(now, (str, int, float)) or now is None else []


def files(start: str) -> list[str]:
    """The files and folders whose paths begin so."""
    found = glob.glob(f"{glob.escape(start)}*")  # noqa: PTH207 - Path would drop a leading ./
    return [f"{path}{os.sep}" if Path(path).is_dir() else path for path in found]
