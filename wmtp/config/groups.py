"""The options of the config groups in conf/, and the description of the groups in `--help`."""

import re
import textwrap

from omegaconf import OmegaConf

from wmtp.config.schema import CONFIG_FOLDER

WIDTH = 80
"""Maximum number of characters in a line of the help text."""
STAGE_GROUPS = ("model", "data", "optimizer", "scheduler", "early_stopping", "checkpoint")
"""Config groups for which training stage 1 may have another option than stage 2."""
DEFAULT = re.compile(r"  - (?:optional )?([\w/]+)(?:@\S+)?: \S+ +# (.*)")
"""Pattern of a line in a defaults list. Its groups capture the name of the config group and the comment."""


def is_group(key: str) -> bool:
    """Return whether a key is the name of a config group."""
    return bool(key) and (CONFIG_FOLDER / key).is_dir()


def group_options(group: str) -> list[str]:
    """Return the options of a config group. The options of the group `experiment` may be in subfolders."""
    folder = CONFIG_FOLDER / group
    found = folder.glob("**/*.yaml" if group == "experiment" else "*.yaml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def selectable_options(group: str) -> list[str]:
    """Return the options of a config group that users may choose. Options named `base` are excluded."""
    return [option for option in group_options(group) if option.rpartition("/")[2] != "base"]


def command_groups(command: str) -> dict[str, str]:
    """Return a dictionary from each config group of a command to its description."""
    lines = (CONFIG_FOLDER / f"{command}.yaml").read_text().splitlines()
    return {found[1]: found[2] for line in lines if (found := DEFAULT.fullmatch(line))}


def describe_groups(command: str) -> str:
    """Return the section of the `--help` text that lists the config groups of a command."""
    lines: list[str] = []
    for group, purpose in command_groups(command).items():
        lines += textwrap.wrap(f"{group}: {purpose}", WIDTH, subsequent_indent="  ")
        lines += textwrap.wrap(
            ", ".join(selectable_options(group)), WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(["== Groups: choose with group=option ==", "", *lines, "", ""]) if lines else ""


OmegaConf.register_new_resolver("groups", describe_groups, replace=True)
