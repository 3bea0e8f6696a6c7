"""Train a model: `python -m wmtp.train [group=option] [key=value] …`; `--help` lists groups and keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import Command, run_command
from wmtp.runtime.run_dir import create_run_folder, display_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig


def train(context: JobContext) -> None:
    """Run one training, or a dry run of it."""
    from wmtp.training.dry_run import dry_run  # these import torch, which --help does not need
    from wmtp.training.run import Run

    if context.config.dry_run:
        dry_run(context.config, context.folder, context.inputs)
    else:
        Run(context.config, context.folder, context.progress, context.overrides, context.inputs).train()


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a training config. The `inputs` of the result are the algorithm."""
    from wmtp.config.overrides import typed_values
    from wmtp.training.validate import check_training  # imports torch

    return check_training(config, typed_values(overrides))


def preflight(config: DictConfig, folder: Path) -> list[str]:
    """Check that the servers in the config accept this run. Return a warning for each server that cannot be reached.

    Raises:
        InputError: a server refuses this run.
    """
    from wmtp.training.uploads import check_servers  # imports torch

    return check_servers(config, folder)


def run_folder(checked: CheckedConfig, overrides: list[str]) -> Path | None:
    """Return the folder for the run, or None for a dry run.

    If a run is resumed, this is the folder of that run. Otherwise, it is the folder in `hydra.run.dir`, or a new folder
    if `hydra.run.dir` is not set.

    Raises:
        ConfigError: `hydra.run.dir` already contains a run, or is given together with `resume`.
    """
    from wmtp.config.overrides import chosen_run_dir, shell_argument
    from wmtp.config.schema import ConfigError, ConfigIssue

    config = checked.config
    if config.dry_run:
        return None
    named = chosen_run_dir(overrides)
    if config.resume is not None:
        if named is not None:
            raise ConfigError(
                [ConfigIssue("hydra.run.dir", str(named), "a resumed run keeps its folder; leave this out")]
            )
        return Path(config.resume)
    if named is None:
        return create_run_folder()
    if (named / "status.json").exists():
        problem = f"already contains a run; resume it ({shell_argument('resume', named)}) or use another folder"
        raise ConfigError([ConfigIssue("hydra.run.dir", str(named), problem)])
    return named


def resume_hint(folder: Path) -> str:
    """Return a message that explains how to resume an interrupted run, or that nothing was saved."""
    from wmtp.config.overrides import shell_argument

    if not any(folder.glob("**/step_*/manifest.json")):
        return "Nothing was saved; start again."
    return f"Resume with {shell_argument('resume', display_path(folder))}"


def end_sweep(folder: Path, state: str) -> None:
    """Send the final state of a sweep to MLflow."""
    from wmtp.tracking.mlflow import end_sweep as end_mlflow_sweep

    end_mlflow_sweep(folder, state)


COMMAND = Command(
    "train", train, check, run_folder, preflight=preflight,
    resume_hint=resume_hint,
    remote_keys={"resume": "latest"},
    end_sweep=end_sweep,
    num_processes=lambda config: int(config.hardware.num_processes),
)  # fmt: skip


def main() -> NoReturn:
    """Run `python -m wmtp.train` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
