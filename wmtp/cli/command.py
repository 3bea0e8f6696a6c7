"""The definition of a command. This module imports nothing slow, because every command imports it first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from wmtp.runtime.standard_streams import announce, lasting_streams

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Job
    from wmtp.config.schema import CheckedConfig

CHECKPOINT_KEY = {"checkpoint": "checkpoint.path"}
"""Alias of the key `checkpoint.path`. Without it, Hydra would treat `checkpoint=…` as the choice of a config group."""

MULTIRUN = ("-m", "--multirun")
"""Options that start a sweep. Other options print something and start no job."""
START_AGAIN = "Nothing was saved; start again."


@dataclass(frozen=True)
class Command:
    """A command of the package: its job, its config checks, and its run folder."""

    name: str
    """Name of the command. It is also the name of the command's config file in conf/ and of its log file."""
    job: Job
    check: Callable[[DictConfig, list[str]], CheckedConfig]
    """Function that completes and checks a composed config. Its second argument is the list of overrides."""
    folder: Callable[[CheckedConfig, list[str]], Path | None] = lambda checked, overrides: None
    """Function that returns the output folder, or None to use a temporary folder that is removed at the end."""
    resume_hint: Callable[[Path], str] = lambda folder: START_AGAIN
    """Function that returns a message about how to continue after an interruption."""
    num_processes: Callable[[DictConfig], int] | None = None
    """Function that returns the number of processes of the job. None means that the command always uses one process."""
    raw_keys: frozenset[str] = frozenset()
    """Config keys whose values are plain text, which Hydra must not parse."""
    positional_args: Callable[[list[str]], list[str]] = lambda arguments: arguments
    """Function that converts positional arguments to `key=value`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Full config key for each short key that users may write on the command line."""
    preflight: Callable[[DictConfig, Path], list[str]] = lambda config, folder: []
    """Function that returns warnings about a valid config, such as unreachable servers."""
    remote_keys: Mapping[str, Literal["latest", "best"]] = field(default_factory=dict)
    """Config keys that accept the S3 URL of a run. Each key is mapped to the checkpoint to download from that run."""
    end_sweep: Callable[[Path, str], None] | None = None
    """Function that receives the folder and final state of a sweep. None means that sweeps are not supported."""


def run_command(command: Command) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the runner handles signals, Ctrl-C ends the process silently
    with lasting_streams():
        if os.environ.get("RANK", "0") == "0" and all(a in MULTIRUN for a in sys.argv[1:] if a.startswith("-")):
            announce(f"{command.name}: checking the config …")
        from wmtp.cli.runner import run  # imports Hydra, which takes a second
        from wmtp.runtime.signals import keep_exit_code

        try:
            run(command)
        finally:
            keep_exit_code()
