"""The checkpoints in a stage's folder, and the files that name the best and the latest."""

import hashlib
import json
import re
from pathlib import Path

from wmtp.checkpoint import manifest

STEP = re.compile(r"step_\d{8,}")


def identity(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint's manifest, and with it of all that it holds."""
    return hashlib.sha256((checkpoint / manifest.NAME).read_bytes()).hexdigest()


def whole_checkpoints(stage: Path) -> list[Path]:
    """The checkpoints in a stage's folder that have a manifest, the oldest first."""
    found = (path.parent for path in (stage / "checkpoints").glob(f"step_*/{manifest.NAME}"))
    return sorted((path for path in found if STEP.fullmatch(path.name)), key=lambda path: step_of(path.name))


def step_of(name: str) -> int:
    """The update after which the checkpoint of this name was made."""
    return int(name.removeprefix("step_"))


def noted(note: Path) -> str | None:
    """The name of the checkpoint in best.json or latest.json; None if that is not there.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    try:
        return str(json.loads(note.read_bytes())["folder"])
    except FileNotFoundError:
        return None
