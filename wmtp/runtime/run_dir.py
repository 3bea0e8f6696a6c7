"""The folder of a run and its status.json."""

import fcntl
import json
import os
import random
import socket
import string
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
"""Subfolder of a run for the evaluations of its model."""
RESUMES = "resumes.jsonl"
"""Name of the file with one line for each time that the run was resumed."""
RUN = "run.json"
"""Name of the file with the run's `id`, which is the same on all machines, and its S3 address `remote`, if any."""
SYNC_STATE = "mlflow.json"
"""Name of the file with the MLflow run of a folder, and the data that were sent to it."""
SWEEP = "sweep.json"
"""Name of the file, in the parent folder of the jobs, with the overrides, state and result of each job of a sweep."""
TOKENS = "tokens.json"
"""Name of the file with validation samples token by token (weights, losses, values) and the calibration of values."""
PRETRAIN = "pretrain"
"""Subfolder of a run for stage 1."""
PROVENANCE = "provenance.json"
"""Name of the file with the code, command and data of the last start of a run."""
SAVED_OVERRIDES = Path(".hydra") / "accepted.json"
"""File with the overrides of a run. Hydra's own record may also contain those of a refused resume."""

LOCK = Path(".hydra") / "lock"
"""Lock file of the command that writes to the folder; the system releases it even if the command is killed."""


def create_run_folder(outputs: Path = OUTPUTS, suffix: str = "") -> Path:
    """Create a new folder `<date>/<time>-<4 random letters>` that no other run or sweep uses."""
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
    """Progress of a job, set by the job and stored in status.json."""

    step: int = 0
    stop_reason: str | None = None
    logged: BaseException | None = None
    """Error whose traceback is already in the log."""


class RunStatus:
    """Writer of status.json: RUNNING at first, then the final state, reason and step. Locks the folder meanwhile.

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
        """Write the final state of the run and release the folder."""
        ended = datetime.now().astimezone().isoformat(timespec="seconds")
        self._fields |= {"state": state, "exit_code": exit_code, "stop_reason": progress.stop_reason, "error": error}
        self._fields |= {"step": progress.step, "ended": ended}
        self._write()
        self._lock.release()

    def withdraw(self) -> bool:
        """Restore the status of the previous run after a refused resume; return whether there was one."""
        if self._before is None:
            return False
        replace_atomically(self.folder / "status.json", self._before)
        self._lock.release()
        return True

    def _write(self) -> None:
        replace_atomically(self.folder / "status.json", encode_json(self._fields))


class FolderLock:
    """The lock of a command that writes to a folder.

    Raises:
        InputError: another command holds the lock.
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
    """Return whether another command is running in a folder, on any machine with the same file system."""
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
    """Return the content of a folder's run.json, or None if it does not exist."""
    path = folder / RUN
    if not path.exists():
        return None
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def mark_dead_run(folder: Path) -> str:
    """Return the final state of a run that is not running; if its status is still RUNNING, record it as KILLED.

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
    """Return a path for messages: relative if it is below the working directory, otherwise absolute."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
