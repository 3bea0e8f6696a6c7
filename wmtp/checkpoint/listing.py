"""List the checkpoints in the folder of a stage, and read the pointer files best.json and latest.json."""

import hashlib
import json
import re
from pathlib import Path

from wmtp.checkpoint import manifest

STEP = re.compile(r"step_\d{8,}")
"""Name of a checkpoint's folder."""


def manifest_hash(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which identifies the checkpoint's content."""
    return hashlib.sha256((checkpoint / manifest.NAME).read_bytes()).hexdigest()


def complete_checkpoints(stage: Path) -> list[Path]:
    """Return the checkpoints of a stage that have a manifest, oldest first. Hashes are not checked."""
    found = (path.parent for path in (stage / "checkpoints").glob(f"step_*/{manifest.NAME}"))
    return sorted((path for path in found if STEP.fullmatch(path.name)), key=lambda path: step_of(path.name))


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(name.removeprefix("step_"))


def read_pointer(path: Path) -> str | None:
    """Return the checkpoint name in best.json or latest.json, or None if the file does not exist.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged.
    """
    try:
        return str(json.loads(path.read_bytes())["folder"])
    except FileNotFoundError:
        return None
