"""Read new lines of a metrics.jsonl, which grows, and is truncated when its run is resumed."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, and step of a metric."""

NOT_METRICS = ("step", "epoch", "time")
POINTS_PER_CALL = 500
"""Number of points in one request to MLflow."""
MAX_NAME_LENGTH = 250
BYTES_PER_READ = 1_000_000


@dataclass(frozen=True)
class Position:
    """A position in a file: number of lines read, their size in bytes, and the last line."""

    lines: int = 0
    size: int = 0
    last: str = ""

    def after(self, lines: Sequence[bytes]) -> "Position":
        """Return the position after the next lines."""
        size = self.size + sum(len(line) for line in lines)
        return Position(self.lines + len(lines), size, lines[-1].decode() if lines else self.last)


class AlreadyLogged:
    """The points of one file that MLflow already has, from `first_step` on, as counts for each metric and step.

    Only the number of points is compared, not their values: a step that is computed again after a resume has another
    speed and, on a GPU, other last bits. The points that were sent first are kept. If several lines of a step have the
    same value of a metric, they count as one point.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self._counts = Counter[tuple[str, int]]()
        self._seen = set[tuple[str, float]]()
        self._step = first_step

    def add(self, name: str, step: int) -> None:
        """Count a point that MLflow has."""
        if step >= self.first_step:
            self._counts[name, step] += 1

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Return those of the file's next points that MLflow lacks; all of them count as sent afterwards."""
        missing = []
        for point in points:
            name, value, _, step = point
            if step != self._step:
                self._step = step
                self._seen.clear()
            if (name, value) in self._seen:
                continue
            self._seen.add((name, value))
            if self._counts[name, step]:
                self._counts[name, step] -= 1
            else:
                missing.append(point)
            if not self._counts[name, step]:
                del self._counts[name, step]
        return missing


def lines_after(path: Path, position: Position) -> list[bytes] | None:
    """Return the next complete lines, at most about a megabyte; None if the file was truncated before `position`.

    Lines hold the time at which they were written. So a file that was truncated and grew again has a different line
    at the position of the last line read.
    """
    if not path.exists():
        return []
    last = position.last.encode()
    with path.open("rb") as file:
        file.seek(position.size - len(last))
        if file.read(len(last)) != last:
            return None
        return [line for line in file.readlines(BYTES_PER_READ) if line.endswith(b"\n")]


def lines_before(path: Path, position: Position) -> list[bytes]:
    """Return the last complete lines up to `position`, at most about a megabyte."""
    if not path.exists():
        return []
    start = max(0, position.size - BYTES_PER_READ)
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read(position.size - start).splitlines(keepends=True)
    return lines[1:] if start else lines


def count_lines(path: Path, position: Position) -> tuple[int, int]:
    """Return the number of lines in a file, and of those after `position`."""
    written = path.read_bytes().count(b"\n") if path.exists() else 0
    return written, written if lines_after(path, position) is None else max(0, written - position.lines)


def clean_name(name: str) -> str:
    """Return the closest name that MLflow accepts for a metric, parameter or tag."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)[:MAX_NAME_LENGTH]
    # MLflow accepts only normalized relative paths.
    parts = ["_" if part in (".", "..") else part for part in allowed.split("/") if part]
    cleaned = "/".join(parts) or "_"
    return f"_{cleaned[2:]}" if cleaned.startswith("..") else cleaned


def step_of(line: bytes) -> int:
    """Return the step of a line."""
    return int(json.loads(line)["step"])


def line_points(line: dict[str, float | str], group: str = "") -> list[Point]:
    """Return the metrics of a line, with names that start with `group`.

    Values that are not finite, which are strings, are not returned, but counted in the metric `nonfinite`.
    """
    timestamp, step = int(float(line["time"]) * 1000), int(line["step"])
    metrics = {name: value for name, value in line.items() if name not in NOT_METRICS}
    points = [
        (clean_name(name if name.startswith(group) else group + name), float(value), timestamp, step)
        for name, value in metrics.items()
        if not isinstance(value, str)
    ]
    if not_finite := len(metrics) - len(points):
        points.append((f"{group}nonfinite", float(not_finite), timestamp, step))
    return points


def batches(lines: Sequence[bytes], group: str = "") -> Iterator[tuple[list[bytes], list[Point]]]:
    """Yield batches of lines with at most `POINTS_PER_CALL` points; a line with more points is a batch of its own."""
    batch, points = list[bytes](), list[Point]()
    for line in lines:
        more = line_points(json.loads(line), group)
        if batch and len(points) + len(more) > POINTS_PER_CALL:
            yield batch, points
            batch, points = [], []
        batch.append(line)
        points += more
    if batch:
        yield batch, points
