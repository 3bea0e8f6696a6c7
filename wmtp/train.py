"""Train a model: `python -m wmtp.train [group=option] [key=value] …`; `--help` lists groups and keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import START_AGAIN, Command, run_command
from wmtp.runtime.run_dir import OUTPUTS, SAVED_OVERRIDES, create_run_folder, display_path, module_command
from wmtp.runtime.writable import require_writable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig


def train(context: JobContext) -> None:
    """Run one training, or a dry run of it. For hardware that this machine lacks, a dry run is only an estimate."""
    from wmtp.training.absent_hardware import estimate_run  # these import torch, which --help does not need
    from wmtp.training.dry_run import dry_run
    from wmtp.training.run import Run
    from wmtp.training.validate import lacking_hardware

    config = context.config
    if lacking_hardware(config):
        estimate_run(config, context.inputs)
    elif config.dry_run:
        dry_run(config, context.folder, context.inputs)
    else:
        Run(config, context.folder, context.progress, context.overrides, context.inputs).train()


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a training config. The `inputs` of the result are the algorithm."""
    from wmtp.config.defaults import complete_tokenizers, drop_keys_of_replaced_classes  # imports Hydra
    from wmtp.config.overrides import typed_values
    from wmtp.training.validate import check_training  # imports torch

    drop_keys_of_replaced_classes(config, overrides)
    complete_tokenizers(config)
    return check_training(config, typed_values(overrides))


def preflight(config: DictConfig, folder: Path) -> list[str]:
    """Check that the stores in the config accept this run. Return a warning for each server that cannot be reached.

    Raises:
        InputError: a server or an SQLite file cannot store this run.
    """
    from wmtp.tracking.mlflow import check_database
    from wmtp.training.uploads import check_servers  # imports torch

    folder = folder if config.resume is None else Path(config.resume).absolute()
    if config.tracking is not None:
        check_database(config.tracking.uri, folder)
    return check_servers(config, folder)


def run_folder(checked: CheckedConfig, overrides: list[str]) -> Path | None:
    """Return the folder for the run, or None for a dry run.

    If a run is resumed, this is the folder of that run. Otherwise, it is the folder in `hydra.run.dir`, or a new folder
    if `hydra.run.dir` is not set.

    Raises:
        ConfigError: `hydra.run.dir` already contains a run, or is given together with `resume`.
        InputError: no files can be written to the folder.
    """
    from wmtp.config.overrides import chosen_run_dir, shell_argument
    from wmtp.config.schema import ConfigError, ConfigIssue

    config, named = checked.config, chosen_run_dir(overrides)
    problem = None
    if named is not None and config.resume is not None:
        problem = "a resumed run keeps its folder; leave this out"
    elif named is not None and (named / "status.json").exists() and (named / "config.yaml").exists():
        resume = shell_argument("resume", named)  # the config shows that the run has started
        problem = f"already contains a run; resume it ({resume}) or use another folder"
    if problem is not None:
        raise ConfigError([ConfigIssue("hydra.run.dir", str(named), problem)])
    require_writable(Path(config.resume or named or OUTPUTS), "hydra.run.dir")
    if config.dry_run:
        return None
    return Path(config.resume) if config.resume is not None else named or create_run_folder()


def num_processes(config: DictConfig) -> int:
    """Return the number of processes of a run. An estimate for hardware that this machine lacks needs only one."""
    from wmtp.training.validate import lacking_hardware  # imports torch

    return 1 if lacking_hardware(config) else int(config.hardware.num_processes)


def resume_hint(folder: Path) -> str:
    """Return a message that explains how to continue an interrupted run."""
    from wmtp.config.overrides import shell_argument
    from wmtp.runtime.processes import started_together

    resume = shell_argument("resume", display_path(folder))
    if not started_together():  # under torchrun, the command starts with torchrun's own options
        resume = f"{module_command('wmtp.train')} {resume}"
    if any(folder.glob("**/step_*/manifest.json")):
        return f"Resume with: {resume}"
    return f"Nothing was saved. Start again with: {resume}" if (folder / SAVED_OVERRIDES).exists() else START_AGAIN


def end_sweep(folder: Path, state: str) -> None:
    """Send the final state of a sweep to MLflow."""
    from wmtp.tracking.mlflow import end_sweep as end_mlflow_sweep

    end_mlflow_sweep(folder, state)


COMMAND = Command(
    "train", train, check, run_folder, preflight=preflight,
    resume_hint=resume_hint,
    remote_keys={"resume": "latest"},
    end_sweep=end_sweep,
    num_processes=num_processes,
)  # fmt: skip


def main() -> NoReturn:
    """Run `python -m wmtp.train` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
