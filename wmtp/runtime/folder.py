"""A run's folder and its status.json."""

import json
import os
import random
import string
from datetime import datetime
from pathlib import Path
from typing import Any

from wmtp.runtime.files import encode_json, replace_atomically

OUTPUTS = Path("outputs")
EVALUATIONS = "evaluations"
"""The folder in a run's folder that holds what was measured of its model."""
ACCEPTED = Path(".hydra") / "accepted.json"
"""The overrides a run was made with. Hydra's own record also holds those of a resume that was refused."""


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


class RunStatus:
    """Writes status.json: RUNNING at once, and how, why and after which `step` the run ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 0
        self.stop_reason: str | None = None
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

    def end(self, state: str, exit_code: int, *, error: str | None = None) -> None:
        """Record the end of the run."""
        ended = datetime.now().astimezone().isoformat(timespec="seconds")
        self._fields |= {"state": state, "exit_code": exit_code, "stop_reason": self.stop_reason, "error": error}
        self._fields |= {"step": self.step, "ended": ended}
        self._write()

    def withdraw(self) -> bool:
        """Put back how the run ended before, if it did: going on with it was refused, and nothing happened."""
        if self._before is not None:
            replace_atomically(self.folder / "status.json", self._before)
        return self._before is not None

    def _write(self) -> None:
        replace_atomically(self.folder / "status.json", encode_json(self._fields))


def read_status(folder: Path) -> dict[str, Any]:
    """The content of a run's status.json."""
    status: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return status


def typed(path: Path | str) -> str:
    """A path as a user would type it from here: relative where it lies below the current folder."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
