"""Write files atomically: a reader, or a restart after a crash, never sees a partly written file."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries (after creating, renaming or removing files), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and flush its content to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def encode_json(content: Any) -> bytes:
    """Return plain values as indented JSON.

    Raises:
        TypeError: the content has a type that JSON does not support, such as a path, a deque or a NumPy array.
        ValueError: a number is not finite.
    """
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def replace_atomically(path: Path, data: bytes) -> None:
    """Replace the content of a file; a reader sees either the old or the new content, never a mixture."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_synced(staged, data)
    os.replace(staged, path)
    fsync_path(path.parent)


def read_or_none(path: Path) -> bytes | None:
    """Return the content of a file, or None if it does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def folder_size(folder: Path) -> int:
    """Return the total bytes of the files in a folder; files that are removed at the same time count as 0."""
    total = 0
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def drop_lines_after(path: Path, step: int) -> None:
    """Remove incomplete lines and lines with a larger `step` from a JSONL file, if it exists."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        replace_atomically(path, b"".join(line for line in lines if json.loads(line)["step"] <= step))
