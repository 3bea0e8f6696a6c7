"""Create and lock the folder of a run, and write its status.json. Define the names of its other files."""

import fcntl
import json
import os
import random
import shlex
import socket
import string
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.locks import try_lock

OUTPUTS = Path("outputs")
EVALUATIONS = "evaluations"
"""Name of the subfolder of a run's folder that contains the evaluations of the trained model."""
RESUMES = "resumes.jsonl"
"""Name of the file that contains one line for each time that the run was resumed."""
RUN = "run.json"
"""Name of the file that contains the `id` of the run, which is the same on all machines. If the run is uploaded to S3,
the file also contains its S3 address (`remote`)."""
SYNC_STATE = "mlflow.json"
"""Name of the file that contains the id of the MLflow run and a record of the data that were sent to MLflow."""
SWEEP = "sweep.json"
"""Name of the file in a sweep's folder that contains the overrides, the state and the result of each job."""
TOKENS = "tokens.json"
"""Name of the file that contains validation samples with the weight, the losses and the predicted value of each token.
It also contains the calibration of the predicted values."""
PRETRAIN = "pretrain"
"""Name of the subfolder of a run's folder that contains the files of stage 1."""
PROVENANCE = "provenance.json"
"""Name of the file that records with which code version, command and data the run was last started."""
SAVED_OVERRIDES = Path(".hydra") / "accepted.json"
"""Path, within a run's folder, of the file that contains the overrides of the run. The file that Hydra itself writes is
not used: after a refused attempt to resume the run, it contains the overrides of this attempt."""

LOCK = Path(".hydra") / "lock"
"""Path, within a run's folder, of the file that a command locks while it writes to the folder. The operating system
also releases the lock if the command is killed."""


def create_run_folder(outputs: Path = OUTPUTS, suffix: str = "") -> Path:
    """Create a new folder for a run or a sweep. No other run or sweep uses this folder.

    Its path is `<outputs>/<date>/<time>-<4 random letters><suffix>`.
    """
    letters = random.SystemRandom()
    while True:
        now = datetime.now()
        name = f"{now:%H-%M-%S}-{''.join(letters.choices(string.ascii_lowercase, k=4))}{suffix}"
        folder = outputs / f"{now:%Y-%m-%d}" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


@dataclass
class JobProgress:
    """The progress of a job. The job sets the fields, and the step and the stop reason are stored in status.json."""

    step: int = 0
    stop_reason: str | None = None
    logged: BaseException | None = None
    """The error that ended the job, if its traceback is already in the log."""


class RunStatus:
    """A writer of the status.json of a run. It locks the run's folder until the final state is written.

    The constructor writes the state RUNNING. The method `end` writes the final state, the stop reason and the last
    step.

    Raises:
        InputError: another command is running in this folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FolderLock(folder)
        path = folder / "status.json"
        self._before = path.read_bytes() if path.exists() else None
        self._fields: dict[str, Any] = {
            "state": "RUNNING",
            "exit_code": None,
            "stop_reason": None,
            "error": None,
            "step": 0,
            "pid": os.getpid(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "ended": None,
        }
        self._write()

    def end(self, state: str, exit_code: int, progress: JobProgress, *, error: str | None = None) -> None:
        """Write the final state of the run to status.json, and release the lock of the folder."""
        ended = datetime.now().astimezone().isoformat(timespec="seconds")
        self._fields |= {"state": state, "exit_code": exit_code, "stop_reason": progress.stop_reason, "error": error}
        self._fields |= {"step": progress.step, "ended": ended}
        self._write()
        self._lock.release()

    def withdraw(self) -> bool:
        """Restore the status.json that existed before this command, and release the lock of the folder.

        This is used if a command was refused before it changed the run, for example a refused attempt to resume it.

        Returns:
            Whether there was an earlier status.json. If there was none, this method does nothing.
        """
        if self._before is None:
            return False
        replace_atomically(self.folder / "status.json", self._before)
        self._lock.release()
        return True

    def _write(self) -> None:
        replace_atomically(self.folder / "status.json", encode_json(self._fields))


class FolderLock:
    """A lock that a command holds while it writes to the folder of a run.

    Raises:
        InputError: another command holds the lock of this folder.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        deadline = time.monotonic() + 1
        while not try_lock(self._file.fileno(), fcntl.LOCK_EX):  # `is_running` of another process holds it for a moment
            if time.monotonic() > deadline:
                raise InputError(f"{folder}: is in use by {_holder(path)}")
            time.sleep(0.02)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Release the lock."""
        self._file.close()


def is_running(folder: Path) -> bool:
    """Return whether another command is running in a folder.

    A command on another machine counts, too, if both machines use the same file system.
    """
    path = folder / LOCK
    if not path.exists() or _holder(path) == f"process {os.getpid()} on {socket.gethostname()}":
        return False
    with path.open() as file:
        return not try_lock(file.fileno(), fcntl.LOCK_SH)


def _holder(path: Path) -> str:
    return path.read_text() or "another process"


def read_status(folder: Path) -> dict[str, Any]:
    """Return the content of a run's status.json."""
    status: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return status


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the content of the run.json in a folder, or None if the file does not exist."""
    path = folder / RUN
    if not path.exists():
        return None
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def mark_dead_run(folder: Path) -> str:
    """Return the final state of a run that no longer runs.

    If the status.json of the run still contains the state RUNNING, write the state KILLED to it.

    Raises:
        InputError: another command is running in this folder.
    """
    status = read_status(folder)
    if status["state"] == "RUNNING":
        lock = FolderLock(folder)
        try:
            last_change = max(path.stat().st_mtime for path in folder.iterdir())
            ended = datetime.fromtimestamp(last_change).astimezone().isoformat(timespec="seconds")
            error = "ended without a final status: the process was killed, or the machine stopped"
            status |= {"state": "KILLED", "error": error, "ended": ended}
            replace_atomically(folder / "status.json", encode_json(status))
        finally:
            lock.release()
    return str(status["state"])


def display_path(path: Path | str) -> str:
    """Return a path in the form in which messages show it.

    It is relative to the working directory if it is below this directory, otherwise absolute.
    """
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def module_command(module: str) -> str:
    """Return the beginning of a shell command that runs a module with the Python of this process, on any PATH."""
    return f"{shlex.quote(display_path(sys.executable))} -m {module}"
