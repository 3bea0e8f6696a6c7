"""Write files atomically. Other processes never read a partly written file, even after a crash."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flush the content of a file or the list of files of a folder to the disk.

    A folder must be flushed after files in it were created, renamed or removed.
    """
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


def share_like_folder(path: Path) -> None:
    """Give a file to the users who may read its folder. Libraries such as safetensors write files for one user only."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def encode_json(content: Any) -> bytes:
    """Return plain values as indented JSON.

    Raises:
        TypeError: the content has a type that JSON does not support, such as a path, a deque or a NumPy array.
        ValueError: the content contains a number that is infinite or NaN.
    """
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def replace_atomically(path: Path, data: bytes) -> None:
    """Create a file or replace its content atomically.

    Another process reads either the old or the new content, never a mixture.
    """
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
    """Return the total size in bytes of the files in a folder, without the files in its subfolders.

    A file counts as 0 bytes if another process removes it during this call. A folder that does not exist has size 0.
    """
    total = 0
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total
