"""Evaluate a trained model: `python -m wmtp.evaluate checkpoint=RUN [data=…] [key=value] …`; see `--help`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import CHECKPOINT_KEY, Command, run_command
from wmtp.runtime.run_dir import EVALUATIONS
from wmtp.runtime.writable import require_writable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig


def evaluate(context: JobContext) -> None:
    """Evaluate a model."""
    from wmtp.evaluation.evaluator import Evaluator  # imports torch, which --help does not need
    from wmtp.evaluation.validate import names_data

    Evaluator(context.config, context.folder, context.inputs, names_data=names_data(context.overrides)).evaluate()


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a config, and add a default sampling temperature and the data settings of the model's training."""
    from wmtp.evaluation.validate import check_evaluation

    return check_evaluation(config, overrides)


def evaluation_folder(checked: CheckedConfig, overrides: list[str]) -> Path:
    """Return the folder for the results of an evaluation, which is created.

    This is `hydra.run.dir` if it is set. Otherwise, it is a folder inside the folder of the evaluated run. Its name
    contains a hash of all settings that determine the samples, so that a repeated evaluation uses the same folder.

    Raises:
        InputError: no files can be written to the folder.
    """
    from wmtp.config.overrides import chosen_run_dir
    from wmtp.evaluation.validate import evaluation_identity

    if named := chosen_run_dir(overrides):
        require_writable(named, "hydra.run.dir")
        return named
    config, checkpoint = checked.config, checked.inputs
    key = hashlib.sha256(json.dumps(evaluation_identity(config, checkpoint), sort_keys=True).encode()).hexdigest()
    folder: Path = checkpoint.run_folder / EVALUATIONS / f"{config.data.get('shape', 'tasks')}-{key[:8]}"
    require_writable(folder, "hydra.run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


COMMAND = Command(
    "evaluate", evaluate, check, evaluation_folder, aliases=CHECKPOINT_KEY, remote_keys={"checkpoint.path": "best"},
    resume_hint=lambda folder: "The graded samples are saved; run the same command again to continue.",
)  # fmt: skip


def main() -> NoReturn:
    """Run `python -m wmtp.evaluate` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
