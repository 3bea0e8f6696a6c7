"""Read the new lines of a file of metrics while training appends lines. A resume of the run may also remove lines."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wmtp.runtime.json_lines import complete_lines, read_lines

Point = tuple[str, float, int, int]
"""One value of a metric: name of the metric, value, time in milliseconds since 1970, and step."""

NOT_METRICS = ("step", "epoch", "time")
"""Keys that each line of metrics.jsonl contains in addition to the metrics."""
POINTS_PER_CALL = 500
"""Maximum number of metric values in one request to MLflow. A line with more values is sent in one request."""
MAX_NAME_LENGTH = 250
"""Maximum length that MLflow accepts for the name of a metric, a parameter or a tag."""
BYTES_PER_READ = 1_000_000


@dataclass(frozen=True)
class Position:
    """Position up to which a file was read: number and total size of the lines that were read, and the last line."""

    lines: int = 0
    size: int = 0
    last: str = ""

    def after(self, lines: Sequence[bytes]) -> "Position":
        """Return the position after `lines`, which are the next lines in the file after this position."""
        size = self.size + sum(len(line) for line in lines)
        return Position(self.lines + len(lines), size, lines[-1].decode() if lines else self.last)


class AlreadyLogged:
    """Record of the points of one file that MLflow already has. It is used to send no point twice.

    A point is one value of a metric at one step. MLflow's points are counted for each metric and each step. Values are
    not compared, because they differ slightly when a step is computed again after a resume. MLflow keeps the points
    that were sent first. If several lines of a step contain the same value of a metric, they count as one point.

    Args:
        counts: number of points in MLflow for each metric and each step from `first_step` on.
        first_step: first step whose points were counted.
    """

    def __init__(self, counts: Mapping[tuple[str, int], int], first_step: int = 0) -> None:
        self.first_step, self._counts = first_step, dict(counts)
        self._step, self._values_of_step = first_step, set[tuple[str, float]]()

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Return the points in `points` that MLflow does not have.

        `points` must directly follow the points of the previous call in the file.
        """
        return [point for point in points if self._is_new_value(point) and not self._remove_one(point)]

    def _is_new_value(self, point: Point) -> bool:
        """Return whether the lines of the point's step have not contained this value of the metric so far."""
        name, value, _, step = point
        if step != self._step:
            self._step, self._values_of_step = step, set()
        is_new = (name, value) not in self._values_of_step
        self._values_of_step.add((name, value))
        return is_new

    def _remove_one(self, point: Point) -> bool:
        """Remove a point with this metric and step from the counts. Return False if there is none."""
        name, _, _, step = point
        count = self._counts.pop((name, step), 0)
        if count > 1:
            self._counts[name, step] = count - 1
        return count > 0


def lines_after(path: Path, position: Position) -> list[bytes] | None:
    """Return the complete lines of a file after `position`, up to about one megabyte.

    Return None if the file was truncated before `position`. To detect this even if the file has grown again, the last
    line that was read must still be at its place. New lines differ from it, because each line contains its time of
    writing.
    """
    if not path.exists():
        return []
    last = position.last.encode()
    with path.open("rb") as file:
        file.seek(position.size - len(last))
        if file.read(len(last)) != last:
            return None
        return complete_lines(file.readlines(BYTES_PER_READ))


def lines_before(path: Path, position: Position) -> list[bytes]:
    """Return the complete lines in the last megabyte of a file before `position`."""
    if not path.exists():
        return []
    start = max(0, position.size - BYTES_PER_READ)
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read(position.size - start).splitlines(keepends=True)
    return lines[1:] if start else lines


def count_lines(path: Path, position: Position) -> tuple[int, int]:
    """Return the number of all complete lines in a file, and the number of complete lines after `position`."""
    written = len(read_lines(path))
    return written, written if lines_after(path, position) is None else max(0, written - position.lines)


def clean_name(name: str) -> str:
    """Replace the characters in a name that MLflow does not accept for a metric, a parameter or a tag."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)[:MAX_NAME_LENGTH]
    # MLflow accepts only normalized relative paths.
    parts = ["_" if part in (".", "..") else part for part in allowed.split("/") if part]
    cleaned = "/".join(parts) or "_"
    return f"_{cleaned[2:]}" if cleaned.startswith("..") else cleaned


def step_of(line: bytes) -> int:
    """Return the step of a line of metrics.jsonl or system.jsonl."""
    return int(json.loads(line)["step"])


def line_points(line: dict[str, float | str], prefix: str = "") -> list[Point]:
    """Convert a line of a file of metrics to points. `prefix` is added to each name that does not start with `prefix`.

    NaN and infinite values, which are strings in the file, are left out. If the line contains such values, their number
    is returned as the metric `nonfinite`.
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
    """Divide the lines of a file of metrics into batches. Yield the lines and the points of each batch.

    A batch has at most `POINTS_PER_CALL` points. A line that has more points is a batch of its own.
    """
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
