"""The parts of `--help` that are written from the files in conf/: the groups with their options, and the config."""

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wmtp.config.groups import selectable_options
from wmtp.config.schema import CONFIG_FOLDER

WIDTH = 80
"""Maximum number of characters in a line of the help text, except for long keys with long values."""
COMMENT_COLUMN = 28
DEFAULT = re.compile(r"  - (?:optional )?([\w/]+)(?:@\S+)?: \S+ +# (.*)")
"""Pattern of a line in a defaults list. Its groups capture the name of the config group and the comment."""
KEY = re.compile(r"( *)([\w.]+):(?: .*?)?(?: +# (.*))?")
"""Pattern of a line with a key. Its groups capture the indentation, the key and the comment."""


def register() -> None:
    """Register the resolvers with which conf/command.yaml describes `--help`."""
    OmegaConf.register_new_resolver("groups", describe_groups, replace=True)
    OmegaConf.register_new_resolver("keys", describe_keys, replace=True)


@contextmanager
def without_unused_lists() -> Iterator[None]:
    """Let Hydra not list all config groups for `--help`, which shows the list of `describe_groups` instead.

    The lists take half of the time of `--help`. They are needed only for `--hydra-help`.
    """
    from hydra._internal.hydra import Hydra

    listing = Hydra.format_config_groups
    Hydra.format_config_groups = lambda *arguments: ""  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.format_config_groups = listing  # type: ignore[method-assign]


class OneLineDumper(yaml.SafeDumper):
    """A writer of YAML that writes a text with newlines as one line with escape sequences."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)


OneLineDumper.add_representer(str, _write_text)


def describe_groups(command: str) -> str:
    """Return the section of the help text that lists the config groups of a command."""
    text = (CONFIG_FOLDER / f"{command}.yaml").read_text()
    lines: list[str] = []
    for group, purpose in (found.groups() for found in map(DEFAULT.fullmatch, text.splitlines()) if found):
        lines += textwrap.wrap(f"{group}: {purpose}", WIDTH, subsequent_indent="  ")
        lines += textwrap.wrap(
            ", ".join(selectable_options(group)), WIDTH, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(["== Groups: choose with group=option ==", "", *lines, "", ""]) if lines else ""


def describe_keys(command: str, *, _root_: DictConfig) -> str:
    """Return the composed config of a command as YAML, in which each key has the comment of its config file.

    Dollar signs are doubled, because Hydra replaces variables in the help text.
    """
    comments = dict(_comments(command, list(_root_.hydra.overrides.task)))
    config = OmegaConf.to_container(OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]))
    lines: list[str] = []
    text = yaml.dump(config, Dumper=OneLineDumper, sort_keys=False, allow_unicode=True, width=1_000)
    for line, key in keyed_lines(text):
        lines += annotated(line, comments.get(key or "", ""))
    return "\n".join(lines).replace("$", "$$")


def annotated(line: str, comment: str) -> list[str]:
    """Return a line of YAML with a comment to its right, which is wrapped to several lines if it is long."""
    column = max(COMMENT_COLUMN, len(line) + 2)
    first, *others = textwrap.wrap(comment, max(WIDTH - column, 30) - 2) or [""]
    return [f"{line:{column}}# {first}" if first else line, *(f"{'':{column}}# {other}" for other in others)]


def keyed_lines(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield each line of a YAML text, and the dotted key that it sets, or None if it sets no key."""
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = KEY.fullmatch(line)
        if found is None:
            yield line, None
            continue
        indent = len(found[1])
        path = [*(each for each in path if each[0] < indent), (indent, found[2])]
        yield line, ".".join(name for _, name in path)


def _comments(command: str, overrides: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the comment of each key in the files from which a config is composed, in their order."""
    loader = GlobalHydra.instance().config_loader()
    for default in loader.compute_defaults_list(command, overrides, RunMode.RUN).defaults:
        path = CONFIG_FOLDER / f"{default.config_path}.yaml"
        prefix = f"{default.package}." if default.package else ""
        for line, key in keyed_lines(path.read_text()) if path.exists() else ():
            found = KEY.fullmatch(line)
            if key is not None and found is not None and found[3]:
                yield f"{prefix}{key}", found[3]
