"""Write metrics.jsonl, which contains all metrics of a run. Each line of the file is a JSON object."""

import json
import math
import os
import time
from pathlib import Path

from wmtp.runtime.json_lines import drop_lines_after, drop_torn_line
from wmtp.tracking.base import State

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Tracker that appends metrics to a run's metrics.jsonl.

    When a run is resumed after step `resume_step`, the lines of later steps are removed, because training repeats these
    steps and writes their lines again.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self.path = folder / FILE_NAME
        if resume_step is not None:
            drop_lines_after(self.path, resume_step)
        else:
            drop_torn_line(self.path)
        self._file = self.path.open("a")

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Append a line with the metrics of a step, and flush the file. NaN and infinite values become strings."""
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": epoch, "time": time.time()} | values
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, state: State) -> None:
        """Sync the file to disk and close it."""
        os.fsync(self._file.fileno())
        self._file.close()
