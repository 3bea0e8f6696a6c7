"""Set up a worker process that the launcher started."""

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
"""Environment variable with the path of the file that contains the context of a worker's job."""
CONTEXT_FILE = "task.json"


def receive_context() -> tuple[dict[str, Any], Path]:
    """Make this worker end with its launcher; return the job's context and the folder shared with the launcher."""
    path = Path(os.environ.pop(CONTEXT_VARIABLE))  # so that a subprocess of this worker is not taken for a worker
    try:
        context: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:  # the launcher was interrupted while it started this worker, and removed the folder
        os._exit(1)
    kill_on_parent_death(context["launcher"])
    return context, path.parent


def mark_ready(folder: Path) -> None:
    """Write the file by which the launcher recognizes that this worker handles signals."""
    staged = folder / f"{os.getpid()}.tmp"
    staged.write_text(str(os.getpid()))
    staged.rename(folder / f"ready-{os.environ['RANK']}")


def ready_files(folder: Path) -> Iterator[Path]:
    """Yield the files of `mark_ready`; each contains the process id of a worker."""
    return folder.glob("ready-*")


def set_up_output(job_logging: dict[str, Any]) -> None:
    """Configure logging as in the command on rank 0; discard all output on the other ranks."""
    if os.environ["RANK"] == "0":
        logging.config.dictConfig(job_logging)
        return
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - used until this process ends
