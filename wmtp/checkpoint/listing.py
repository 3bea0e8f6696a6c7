"""List the checkpoints in the folder of a stage, and read the pointer files best.json and latest.json."""

import json
import re
from pathlib import Path

from wmtp.checkpoint import manifest

STEP = re.compile(r"step_\d{8,}")
"""Pattern of the name of a checkpoint's folder."""
CHECKPOINT_PATH = re.compile(r"(?:(?:pretrain/)?checkpoints/)?step_\d{8,}")
"""Pattern of the path of a checkpoint in a pointer file. It cannot lead out of the run's folder."""


def complete_checkpoints(stage: Path) -> list[Path]:
    """Return the checkpoint folders of a stage that contain a manifest, oldest first. Do not check the hashes."""
    found = (path.parent for path in (stage / "checkpoints").glob(f"step_*/{manifest.NAME}"))
    return sorted((path for path in found if STEP.fullmatch(path.name)), key=lambda path: step_of(path.name))


def step_of(name: str) -> int:
    """Return the step number that the name of a checkpoint's folder contains."""
    return int(name.removeprefix("step_"))


def read_pointer(path: Path) -> str | None:
    """Return the name of the checkpoint folder that best.json or latest.json contains; None if the file does not exist.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged, or what it names is not a checkpoint beside it.
    """
    try:
        return checkpoint_path(json.loads(path.read_bytes())["folder"])
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def checkpoint_path(value: object) -> str:
    """Return the path of a checkpoint that a pointer file or the result of stage 1 contains.

    Raises:
        ValueError: the value is not the path of a checkpoint inside the run's folder.
    """
    if not CHECKPOINT_PATH.fullmatch(str(value)):
        raise ValueError(f"{value} is not the path of a checkpoint")
    return str(value)
