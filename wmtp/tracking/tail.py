"""Read the new lines of a metrics.jsonl. The file grows, and is truncated when its run is resumed."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, and step of a metric."""

NOT_METRICS = ("step", "epoch", "time")
"""Keys of a line that are not metrics."""
POINTS_PER_CALL = 500
"""Maximum number of points in one request to MLflow."""
MAX_NAME_LENGTH = 250
"""Maximum length that MLflow accepts for names of metrics, parameters and tags."""
BYTES_PER_READ = 1_000_000


@dataclass(frozen=True)
class Position:
    """Position of a reader in a file: the number of lines read, their size in bytes, and the last of them."""

    lines: int = 0
    size: int = 0
    last: str = ""

    def after(self, lines: Sequence[bytes]) -> "Position":
        """Return the position after `lines`, which follow this position in the file."""
        size = self.size + sum(len(line) for line in lines)
        return Position(self.lines + len(lines), size, lines[-1].decode() if lines else self.last)


class AlreadyLogged:
    """Number of points that MLflow has from one file, for each metric and each step from `first_step` on.

    Only the number of points is compared, not their values. A step that is computed again after a resume has another
    speed and, on a GPU, slightly different values. MLflow keeps the points that were sent first. Lines of one step with
    the same value of a metric count as one point.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self._counts = Counter[tuple[str, int]]()
        self._seen = set[tuple[str, float]]()
        self._step = first_step

    def add(self, name: str, step: int) -> None:
        """Count one point that MLflow has."""
        if step >= self.first_step:
            self._counts[name, step] += 1

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Return the points that MLflow does not have. `points` follow in the file; all count as sent afterwards."""
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
    """Return the complete lines after `position`, at most about one megabyte; None if `position` is not valid anymore.

    A position becomes invalid when the file is truncated before it. Each line contains the time at which it was
    written. So if the file has grown again since, the last line that was read is not found at its place.
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
    """Return the complete lines before `position`, at most about one megabyte: those nearest to `position`."""
    if not path.exists():
        return []
    start = max(0, position.size - BYTES_PER_READ)
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read(position.size - start).splitlines(keepends=True)
    return lines[1:] if start else lines


def count_lines(path: Path, position: Position) -> tuple[int, int]:
    """Return the number of lines in a file, and the number of lines after `position`."""
    written = path.read_bytes().count(b"\n") if path.exists() else 0
    return written, written if lines_after(path, position) is None else max(0, written - position.lines)


def clean_name(name: str) -> str:
    """Return a similar name that MLflow accepts for a metric, parameter or tag."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)[:MAX_NAME_LENGTH]
    # MLflow accepts only normalized relative paths.
    parts = ["_" if part in (".", "..") else part for part in allowed.split("/") if part]
    cleaned = "/".join(parts) or "_"
    return f"_{cleaned[2:]}" if cleaned.startswith("..") else cleaned


def step_of(line: bytes) -> int:
    """Return the step of a line of metrics.jsonl or system.jsonl."""
    return int(json.loads(line)["step"])


def line_points(line: dict[str, float | str], prefix: str = "") -> list[Point]:
    """Return the metrics of a line. `prefix` is added to names that do not start with it.

    Values that are not finite are strings in the file. They are not returned; the metric `nonfinite` is their number.
    """
    timestamp, step = int(float(line["time"]) * 1000), int(line["step"])
    metrics = {name: value for name, value in line.items() if name not in NOT_METRICS}
    points = [
        (clean_name(name if name.startswith(prefix) else prefix + name), float(value), timestamp, step)
        for name, value in metrics.items()
        if not isinstance(value, str)
    ]
    if not_finite := len(metrics) - len(points):
        points.append((f"{prefix}nonfinite", float(not_finite), timestamp, step))
    return points


def batches(lines: Sequence[bytes], prefix: str = "") -> Iterator[tuple[list[bytes], list[Point]]]:
    """Yield batches of lines, each with its points: at most `POINTS_PER_CALL` of them, or those of a single line."""
    batch, points = list[bytes](), list[Point]()
    for line in lines:
        more = line_points(json.loads(line), prefix)
        if batch and len(points) + len(more) > POINTS_PER_CALL:
            yield batch, points
            batch, points = [], []
        batch.append(line)
        points += more
    if batch:
        yield batch, points
