"""The description of a command, and how its file runs it. Imports nothing slow: command files begin with it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Job
    from wmtp.config.schema import Fault

CHECKPOINT_KEY = {"checkpoint": "checkpoint.path"}
"""A short key, since Hydra takes `checkpoint` itself for the group of that name."""


def unchanged(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config as it was composed."""
    return config


@dataclass(frozen=True)
class Command:
    """One door of the package: what it does, and what is its own about its config and its folder."""

    name: str
    """Of its config in conf/, and of its log file."""
    job: Job
    faults: Callable[[DictConfig], list[Fault]]
    """Everything that is wrong with a config."""
    folder: Callable[[DictConfig, list[str]], Path | None]
    """Where it writes; None: a folder that goes when the command ends."""
    complete: Callable[[DictConfig, list[str]], DictConfig] = unchanged
    """What the config becomes, given the overrides that were typed."""
    advice: Callable[[Path], str] = lambda folder: "Nothing was saved; start anew."
    """What to do after an interruption."""
    num_processes: Callable[[DictConfig], int] | None = None
    """How many processes do the job together; None: always one."""
    texts: frozenset[str] = frozenset()
    """Keys whose values are text, whatever characters they hold."""
    in_full: Callable[[list[str]], list[str]] = lambda arguments: arguments
    """The arguments with keys for those that may be typed without."""
    short: Mapping[str, str] = field(default_factory=dict)
    """Keys that users may type for longer ones."""
    problems: Callable[[DictConfig, Path], list[str]] = lambda config, folder: []
    """What may keep a sound config from being done, short of making it impossible."""
    fetches: Mapping[str, Literal["latest", "best"]] = field(default_factory=dict)
    """Keys that may name an address in S3, and which checkpoints of the run there are then brought."""
    end_sweep: Callable[[Path, str], None] | None = None
    """What else is to be told that a sweep in this folder ended in this state; None: it is not swept."""


def run_command(command: Command) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the runner handles signals, Ctrl-C ends the process silently
    from wmtp.cli.runner import run  # imports Hydra, which takes a second

    run(command)
