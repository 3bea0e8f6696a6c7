"""The groups of conf/: which of them a command has, their options, and what is said of them."""

import re
import textwrap

from omegaconf import OmegaConf

from wmtp.config.schema import CONFIG_FOLDER

WIDTH = 80
"""Columns of a terminal."""
STAGE_GROUPS = ("model", "data", "optimizer", "scheduler", "early_stopping", "checkpoint")
"""Groups that the stage before the training may change."""
DEFAULT = re.compile(r"  - (?:optional )?([\w/]+)(?:@\S+)?: \S+ +# (.*)")
"""A line of a command's defaults list: a group, and what its comment says of it."""


def is_group(key: str) -> bool:
    """Whether a key chooses a config group's option rather than setting a value."""
    return bool(key) and (CONFIG_FOLDER / key).is_dir()


def options_of(group: str) -> list[str]:
    """The options of a group; experiments may lie in folders."""
    folder = CONFIG_FOLDER / group
    found = folder.glob("**/*.yaml" if group == "experiment" else "*.yaml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def offered(group: str) -> list[str]:
    """The options that users choose from: a base is there for others to build on."""
    return [option for option in options_of(group) if option.rpartition("/")[2] != "base"]


def groups_of(command: str) -> dict[str, str]:
    """The groups of a command, and what each is for."""
    lines = (CONFIG_FOLDER / f"{command}.yaml").read_text().splitlines()
    return {found[1]: found[2] for line in lines if (found := DEFAULT.fullmatch(line))}


def described(command: str) -> str:
    """What `--help` says of a command's groups."""
    lines: list[str] = []
    for group, purpose in groups_of(command).items():
        lines += textwrap.wrap(f"{group}: {purpose}", WIDTH, subsequent_indent="  ")
        lines += textwrap.wrap(", ".join(offered(group)), WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(["== Groups: choose with group=option ==", "", *lines, "", ""]) if lines else ""


OmegaConf.register_new_resolver("groups", described, replace=True)
