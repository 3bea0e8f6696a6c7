"""Following a metrics.jsonl, which grows, and is cut when its run resumes: its lines and the points they hold."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Point = tuple[str, float, int, int]
"""A metric's name, its value, milliseconds since 1970, the step."""

NOT_METRICS = ("step", "epoch", "time")
POINTS_PER_CALL = 500
NAME_CHARACTERS = 250
BYTES_PER_READ = 1_000_000


@dataclass(frozen=True)
class Position:
    """How far a file was read: so many lines, of so many bytes, and the last of them."""

    lines: int = 0
    size: int = 0
    last: str = ""

    def after(self, lines: Sequence[bytes]) -> "Position":
        """The position behind the next lines."""
        size = self.size + sum(len(line) for line in lines)
        return Position(self.lines + len(lines), size, lines[-1].decode() if lines else self.last)


class Stored:
    """How many points a store has of each metric and step that one file has not shown yet, from one step on.

    The values do not count: a step that is made again has another speed, and on a GPU other last bits. The first
    ones stand. Of a step's lines in the file, those that agree in a metric share one point.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self._there = Counter[tuple[str, int]]()
        self._shown = set[tuple[str, float]]()
        self._step = first_step

    def add(self, name: str, step: int) -> None:
        """Note a point of the store."""
        if step >= self.first_step:
            self._there[name, step] += 1

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Those of the file's next points that the store has not; they are taken for sent."""
        missing = []
        for point in points:
            name, value, _, step = point
            if step != self._step:
                self._step = step
                self._shown.clear()
            if (name, value) in self._shown:
                continue
            self._shown.add((name, value))
            if self._there[name, step]:
                self._there[name, step] -= 1
            else:
                missing.append(point)
            if not self._there[name, step]:
                del self._there[name, step]
        return missing


def lines_after(path: Path, position: Position) -> list[bytes] | None:
    """The next whole lines, about a megabyte at most; None if the file was cut before `position`.

    A line holds the time at which it was written, so a cut file that grew again has another in the last one's place.
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
    """The last whole lines up to `position`, about a megabyte at most."""
    if not path.exists():
        return []
    start = max(0, position.size - BYTES_PER_READ)
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read(position.size - start).splitlines(keepends=True)
    return lines[1:] if start else lines


def count_lines(path: Path, position: Position) -> tuple[int, int]:
    """The number of lines in a file, and of those after `position`."""
    written = path.read_bytes().count(b"\n") if path.exists() else 0
    return written, written if lines_after(path, position) is None else max(0, written - position.lines)


def clean_name(name: str) -> str:
    """The nearest name that MLflow allows for a metric, parameter or tag."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)[:NAME_CHARACTERS]
    # MLflow refuses what is not a normalised relative path.
    parts = ["_" if part in (".", "..") else part for part in allowed.split("/") if part]
    cleaned = "/".join(parts) or "_"
    return f"_{cleaned[2:]}" if cleaned.startswith("..") else cleaned


def step_of(line: bytes) -> int:
    """The step that a line is of."""
    return int(json.loads(line)["step"])


def line_points(line: dict[str, float | str], group: str = "") -> list[Point]:
    """The metrics of a line, with names that begin with `group`; those not finite, which are strings, are counted."""
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
    """As many whole lines at a time as a call may hold, with their points; a longer line stands alone."""
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
