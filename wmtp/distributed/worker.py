"""Set up a worker, which is a process that the launcher of a run started."""

import json
import logging
import logging.config
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wmtp.runtime.processes import kill_on_parent_death

CONTEXT_VARIABLE = "WMTP_TASK"
"""Environment variable of a worker. It contains the path of the file with the input of the worker's job."""
CONTEXT_FILE = "task.json"


def receive_context() -> tuple[dict[str, Any], Path]:
    """Read the input of the job that the launcher wrote for this worker.

    From then on, this worker ends when the launcher ends.

    Returns:
        The input of the job, and the folder that this worker shares with the launcher.
    """
    path = Path(os.environ.pop(CONTEXT_VARIABLE))  # so that a subprocess of this worker is not taken for a worker
    try:
        context: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:  # the launcher was interrupted while it started this worker, and removed the folder
        os._exit(1)
    kill_on_parent_death(context["launcher"])
    return context, path.parent


def mark_ready(folder: Path) -> None:
    """Inform the launcher that this worker now handles signals.

    The function writes a file that contains the process id of this worker.
    """
    staged = folder / f"{os.getpid()}.tmp"
    staged.write_text(str(os.getpid()))
    staged.rename(folder / f"ready-{os.environ['RANK']}")


def ready_files(folder: Path) -> Iterator[Path]:
    """Yield the files that the workers wrote with `mark_ready`. Each file contains the process id of a worker."""
    return folder.glob("ready-*")


def set_up_output(job_logging: dict[str, Any]) -> None:
    """Configure the output of a worker.

    On rank 0, apply `job_logging`, which is the logging configuration of the command. On the other ranks, discard all
    output.
    """
    if os.environ["RANK"] == "0":
        logging.config.dictConfig(job_logging)
        return
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - used until this process ends
