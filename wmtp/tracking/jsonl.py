"""metrics.jsonl: every metric of a run, one object per line. The truth from which trackers are fed."""

import json
import math
import os
import time
from pathlib import Path

from wmtp.runtime.atomic_files import drop_lines_after
from wmtp.tracking.base import State

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to a run's metrics.jsonl.

    A resumed run first drops the lines after the step it continues from, since it writes them again.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self.path = folder / FILE_NAME
        if resume_step is not None:
            drop_lines_after(self.path, resume_step)
        self._file = self.path.open("a")

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Append one line and hand it to the operating system. A value that is not finite becomes a string."""
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": epoch, "time": time.time()} | values
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, state: State) -> None:
        """Put the file on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
