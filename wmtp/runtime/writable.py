"""Check before a job that its files can be written."""

import os
import tempfile
from pathlib import Path

from wmtp.errors import InputError

PROBE_BYTES = 1_048_576
"""Number of bytes that are written as a test."""


def write_problem(folder: Path) -> str | None:
    """Return the reason for which no files can be written to a folder, or None.

    A folder that does not exist is not created. Instead, the folder that would contain it is tested.
    """
    folder = Path(os.path.abspath(folder))
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        if not existing.is_dir():
            is_link = existing.is_symlink()
            problem = f"is a link to {existing.readlink()}, which is not a folder" if is_link else "is not a folder"
            return f"cannot be used: {existing} {problem}"
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only here
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def require_writable(folder: Path, key: str) -> None:
    """Check that files can be written to a folder, which the user chooses with the config key `key`.

    Raises:
        InputError: they cannot be written.
    """
    if problem := write_problem(folder):
        raise InputError(f"{folder}: {problem}; choose another folder with {key}=DIR")
