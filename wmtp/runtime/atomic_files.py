"""Writing files so that a reader, or a crash, never meets half of one."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Put a file's content, or a folder's entries (what was created, renamed or removed in it), on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and put its content on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def encode_json(content: Any) -> bytes:
    """Indented JSON. Plain types only.

    Raises:
        TypeError: something JSON cannot hold, such as a path, a deque or a NumPy array.
        ValueError: a number that is not finite.
    """
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def replace_atomically(path: Path, data: bytes) -> None:
    """Give a file new content: a reader sees the old or the new one, whole."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_synced(staged, data)
    os.replace(staged, path)
    sync(path.parent)


def content_if_there(path: Path) -> bytes | None:
    """What a file holds; None if it is not there, or not any more."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def size_of(folder: Path) -> int:
    """The bytes of a folder's files; of what goes while it is looked at, none."""
    total = 0
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def drop_lines_after(path: Path, step: int) -> None:
    """Leave in a JSONL file, if it is there, only the whole lines whose `step` is no later than this one."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        replace_atomically(path, b"".join(line for line in lines if json.loads(line)["step"] <= step))
