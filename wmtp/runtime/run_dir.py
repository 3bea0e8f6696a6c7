"""A run's folder and its status.json."""

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
from wmtp.runtime.locks import is_taken

OUTPUTS = Path("outputs")
EVALUATIONS = "evaluations"
"""The folder in a run's folder that holds what was measured of its model."""
RESUMES = "resumes.jsonl"
"""A line for each time that the run was gone on with."""
RUN = "run.json"
"""The run's `id`, the same on every machine that it is gone on with, and its place in S3, `remote`, if it has one."""
RECEIPT = "mlflow.json"
"""Which MLflow run belongs to a folder, and how far each of its files was sent."""
SWEEP = "sweep.json"
"""The record of a sweep, in the folder around those of its jobs: each with its overrides, state and result."""
TOKENS = "tokens.json"
"""Some validation samples token by token, with weights, losses and values, and how well values are calibrated."""
PRETRAIN = "pretrain"
"""The folder in a run's that the stage before has for itself."""
PROVENANCE = "provenance.json"
"""Which code, command and data a run was last started with."""
ACCEPTED = Path(".hydra") / "accepted.json"
"""The overrides a run was made with. Hydra's own record also holds those of a resume that was refused."""

LOCK = Path(".hydra") / "lock"
"""Locked as long as the command runs that writes this folder; the system unlocks it however that ends."""


def create_run_folder(outputs: Path = OUTPUTS, suffix: str = "") -> Path:
    """A new folder `<date>/<time>-<4 random letters>`: never one that another run or sweep uses."""
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
class Ending:
    """What a job reports of how far it came."""

    step: int = 0
    stop_reason: str | None = None
    logged: BaseException | None = None
    """The error whose traceback is in the log already."""


class RunStatus:
    """Writes status.json: RUNNING at once, and how, why and after which step the run ended. Locks the folder till then.

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

    def end(self, state: str, exit_code: int, ending: Ending, *, error: str | None = None) -> None:
        """Record the end of the run."""
        ended = datetime.now().astimezone().isoformat(timespec="seconds")
        self._fields |= {"state": state, "exit_code": exit_code, "stop_reason": ending.stop_reason, "error": error}
        self._fields |= {"step": ending.step, "ended": ended}
        self._write()
        self._lock.release()

    def withdraw(self) -> bool:
        """Put back how the run ended before, if it did: going on with it was refused, and nothing happened."""
        if self._before is None:
            return False
        replace_atomically(self.folder / "status.json", self._before)
        self._lock.release()
        return True

    def _write(self) -> None:
        replace_atomically(self.folder / "status.json", encode_json(self._fields))


class FolderLock:
    """Says that a command is running in a folder.

    Raises:
        InputError: another one is.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        deadline = time.monotonic() + 1
        while not is_taken(self._file.fileno(), fcntl.LOCK_EX):  # who only asks holds it for a moment
            if time.monotonic() > deadline:
                raise InputError(f"{folder}: is in use by {_holder(path)}")
            time.sleep(0.02)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """The command is done."""
        self._file.close()


def is_running(folder: Path) -> bool:
    """Whether another command is running in a folder, on this machine or on another that shares it."""
    path = folder / LOCK
    if not path.exists() or _holder(path) == f"process {os.getpid()} on {socket.gethostname()}":
        return False
    with path.open() as file:
        return not is_taken(file.fileno(), fcntl.LOCK_SH)


def _holder(path: Path) -> str:
    return path.read_text() or "another process"


def read_status(folder: Path) -> dict[str, Any]:
    """The content of a run's status.json."""
    status: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return status


def read_run(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's run.json; None if it has none."""
    path = folder / RUN
    if not path.exists():
        return None
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def close_dead(folder: Path) -> str:
    """The state of a run that is not going on: one that says it is running has died, and is recorded as killed.

    Raises:
        InputError: another command is running in this folder.
    """
    status = read_status(folder)
    if status["state"] == "RUNNING":
        lock = FolderLock(folder)
        try:
            last_sign = max(path.stat().st_mtime for path in folder.iterdir())
            ended = datetime.fromtimestamp(last_sign).astimezone().isoformat(timespec="seconds")
            error = "it ended without a word: its process was killed, or its machine stopped"
            status |= {"state": "KILLED", "error": error, "ended": ended}
            replace_atomically(folder / "status.json", encode_json(status))
        finally:
            lock.release()
    return str(status["state"])


def typed(path: Path | str) -> str:
    """A path as a user would type it from here: relative where it lies below the current folder."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
