"""The definition of a command. Imports nothing slow, because every command module imports it first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Job
    from wmtp.config.schema import ConfigIssue

CHECKPOINT_KEY = {"checkpoint": "checkpoint.path"}
"""Alias for `checkpoint.path`, because Hydra reserves `checkpoint` for the config group of that name."""


def unchanged(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the config as Hydra composed it."""
    return config


@dataclass(frozen=True)
class Command:
    """A command of the package: its job, its config checks, and its run folder."""

    name: str
    """Name of its config file in conf/ and of its log file."""
    job: Job
    find_issues: Callable[[DictConfig], list[ConfigIssue]]
    """Function that returns all errors of a config."""
    folder: Callable[[DictConfig, list[str]], Path | None]
    """Function that returns the output folder; None means a temporary folder, removed when the command ends."""
    complete: Callable[[DictConfig, list[str]], DictConfig] = unchanged
    """Function that completes the composed config, given the overrides of the user."""
    resume_hint: Callable[[Path], str] = lambda folder: "Nothing was saved; start again."
    """Function that returns advice for the user after an interruption."""
    num_processes: Callable[[DictConfig], int] | None = None
    """Function that returns the number of processes of the job; None if the command always uses one."""
    raw_keys: frozenset[str] = frozenset()
    """Keys whose values are plain text that Hydra must not parse."""
    positional_args: Callable[[list[str]], list[str]] = lambda arguments: arguments
    """Function that turns positional arguments into `key=value`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Short keys, mapped to full keys."""
    preflight: Callable[[DictConfig, Path], list[str]] = lambda config, folder: []
    """Function that returns warnings about a valid config, such as unreachable servers."""
    remote_keys: Mapping[str, Literal["latest", "best"]] = field(default_factory=dict)
    """Keys whose value may be an S3 URL, and the checkpoint of that run that is downloaded."""
    end_sweep: Callable[[Path, str], None] | None = None
    """Function that receives the folder and final state of a sweep; None if the command does not support sweeps."""


def run_command(command: Command) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the runner handles signals, Ctrl-C ends the process silently
    from wmtp.cli.runner import run  # imports Hydra, which takes a second

    run(command)
