"""Read and repair JSONL files. A crash can leave an incomplete last line, which is ignored everywhere."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wmtp.runtime.atomic_files import replace_atomically


def complete_lines(lines: Iterable[bytes]) -> list[bytes]:
    """Return the lines that end with a line break, which is part of each line. `lines` may be an open binary file."""
    return [line for line in lines if line.endswith(b"\n")]


def read_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file. If the file does not exist, the result is empty."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return complete_lines(file)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in the complete lines of a file. If the file does not exist, the result is empty."""
    return [json.loads(line) for line in read_lines(path)]


def drop_torn_line(path: Path) -> list[bytes]:
    """Remove the last line of a file if it is incomplete, and return the other lines."""
    lines = read_lines(path)
    if path.exists() and path.stat().st_size > (size := sum(map(len, lines))):
        os.truncate(path, size)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of a file whose value of `step` is larger than the argument `step`, and an incomplete last line.

    If the file does not exist, do nothing.
    """
    if path.exists():
        replace_atomically(path, b"".join(line for line in read_lines(path) if json.loads(line)["step"] <= step))
