"""What a worker process finds in its environment, and what its launcher needs of it."""

import json
import logging
import logging.config
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wmtp.runtime.processes import die_with

TASK = "WMTP_TASK"
"""The environment's variable that names the file of a worker's task."""
TASK_FILE = "task.json"


def receive_task() -> tuple[dict[str, Any], Path]:
    """Bind this worker to its launcher; its task, and the private folder where both leave word for each other."""
    path = Path(os.environ.pop(TASK))  # what this worker starts is no worker
    try:
        task: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:  # the launcher has cleaned up: it was interrupted while it started this worker
        os._exit(1)
    die_with(task["launcher"])
    return task, path.parent


def tell_ready(folder: Path) -> None:
    """Let the launcher know that this worker handles signals from now on."""
    staged = folder / f"{os.getpid()}.tmp"
    staged.write_text(str(os.getpid()))
    staged.rename(folder / f"ready-{os.environ['RANK']}")


def ready_marks(folder: Path) -> Iterator[Path]:
    """The files that hold the process numbers of the workers that are ready."""
    return folder.glob("ready-*")


def set_up_output(job_logging: dict[str, Any]) -> None:
    """Log as the command does in the first process of a run, and print nothing in the others."""
    if os.environ["RANK"] == "0":
        logging.config.dictConfig(job_logging)
        return
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the rest of this process
