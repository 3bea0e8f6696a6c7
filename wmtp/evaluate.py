"""Measure a trained model: `python -m wmtp.evaluate checkpoint=RUN [data=…] [key=value] …`; `--help` lists both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import CHECKPOINT_KEY, Command, run_command
from wmtp.runtime.run_dir import EVALUATIONS

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Task
    from wmtp.config.schema import Fault


def evaluate(task: Task) -> float | None:
    """One evaluation in its folder; returns pass@k for the first k."""
    from wmtp.evaluation.evaluator import Evaluator  # imports torch, and --help needs none of it

    return Evaluator(task.config, task.folder).evaluate()


def complete(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config with a temperature, and with what it takes from the run."""
    from omegaconf import OmegaConf

    from wmtp.evaluation.validate import with_data_of_the_run, with_temperature

    n = OmegaConf.select(config, "evaluation.n")
    return with_data_of_the_run(with_temperature(config, n), overrides)


def faults(config: DictConfig) -> list[Fault]:
    """All faults of a config."""
    from wmtp.evaluation.validate import evaluation_faults

    return evaluation_faults(config)


def evaluation_folder(config: DictConfig, overrides: list[str]) -> Path:
    """`RUN/evaluations/<data>-<hash of what decides the samples>`, unless the user named a folder.

    Raises:
        ConfigError: it cannot be made.
    """
    from wmtp.config.overrides import named_folder
    from wmtp.config.schema import ConfigError, Fault
    from wmtp.evaluation.validate import deciding
    from wmtp.models.loading import find_checkpoint

    if named := named_folder(overrides):
        return named
    checkpoint, config_path = find_checkpoint(Path(config.checkpoint.path))
    key = hashlib.sha256(json.dumps(deciding(config, checkpoint), sort_keys=True).encode()).hexdigest()
    folder = config_path.parent / EVALUATIONS / f"{config.data.get('shape', 'tasks')}-{key[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made ({error.strerror}); name another folder: hydra.run.dir=…"
        raise ConfigError([Fault("hydra.run.dir", str(folder), problem)]) from error
    return folder


COMMAND = Command(
    "evaluate", evaluate, faults, evaluation_folder, complete=complete,
    short=CHECKPOINT_KEY, fetches={"checkpoint.path": "best"},
    advice=lambda folder: "What was judged is kept: the same command goes on from there.",
)  # fmt: skip


def main() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
