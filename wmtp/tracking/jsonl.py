"""metrics.jsonl: all metrics of a run, one JSON object per line. Other trackers read them from this file."""

import json
import math
import os
import time
from pathlib import Path

from wmtp.runtime.atomic_files import drop_lines_after
from wmtp.tracking.base import State

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Tracker that appends to a run's metrics.jsonl.

    When a run is resumed, the lines after `resume_step` are removed first, because training writes them again.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self.path = folder / FILE_NAME
        if resume_step is not None:
            drop_lines_after(self.path, resume_step)
        self._file = self.path.open("a")

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Append one line and flush the file. A value that is not finite is written as a string."""
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": epoch, "time": time.time()} | values
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, state: State) -> None:
        """Sync the file to disk and close it."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl. An incomplete last line, left by a crash, is ignored."""
    complete, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]
