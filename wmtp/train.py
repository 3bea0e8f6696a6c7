"""Train a model: `python -m wmtp.train [group=option] [key=value] …`; `--help` lists both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import Command, run_command
from wmtp.runtime.run_dir import create_run_folder, typed

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Task
    from wmtp.config.schema import Fault


def train(task: Task) -> float | None:
    """One run in its folder; returns the last validation loss."""
    from wmtp.training.dry_run import rehearse  # these import torch, and --help needs none of it
    from wmtp.training.run import Run

    if task.config.dry_run:
        rehearse(task.config, task.folder)
        return None
    return Run(task.config, task.folder, task.ending, task.overrides).train()


def faults(config: DictConfig) -> list[Fault]:
    """All faults of a training config."""
    from wmtp.training.validate import config_faults  # imports torch

    return config_faults(config)


def problems(config: DictConfig, folder: Path) -> list[str]:
    """Servers that cannot be reached. Raises `InputError` where one refuses this run."""
    from wmtp.training.uploads import check_servers  # imports torch

    return check_servers(config, folder)


def run_folder(config: DictConfig, overrides: list[str]) -> Path | None:
    """The folder of the run: that of the run to resume, the one the user named, or a new one.

    Raises:
        ConfigError: the named folder belongs to a run already.
    """
    from wmtp.config.overrides import named_folder
    from wmtp.config.schema import ConfigError, Fault

    if config.dry_run:
        return None
    named = named_folder(overrides)
    if config.resume is not None:
        if named is not None:
            raise ConfigError([Fault("hydra.run.dir", str(named), "a resumed run goes on in its own folder")])
        return Path(config.resume)
    if named is None:
        return create_run_folder()
    if (named / "status.json").exists():
        problem = f"holds a run already; go on with it (resume={named}) or name another folder"
        raise ConfigError([Fault("hydra.run.dir", str(named), problem)])
    return named


def advice(folder: Path) -> str:
    """How to go on with an interrupted run."""
    resumable = any(folder.glob("**/step_*/manifest.json"))
    return f"Go on with resume={typed(folder)}" if resumable else "Nothing was saved; start anew."


def end_sweep(folder: Path, state: str) -> None:
    """Tell MLflow how a sweep ended."""
    from wmtp.tracking.mlflow import end_sweep as tell_mlflow

    tell_mlflow(folder, state)


COMMAND = Command(
    "train", train, faults, run_folder, problems=problems,
    advice=advice,
    fetches={"resume": "latest"},
    end_sweep=end_sweep,
    num_processes=lambda config: int(config.hardware.num_processes),
)  # fmt: skip


def main() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
