"""Send the metrics from the files of a run to MLflow while training appends to the files. No value is sent twice."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.runtime.background import BackgroundSender
from wmtp.runtime.run_dir import EVALUATIONS
from wmtp.tracking import system_metrics
from wmtp.tracking.jsonl import FILE_NAME
from wmtp.tracking.mlflow.artifacts import read_best
from wmtp.tracking.mlflow.sync_state import SyncState
from wmtp.tracking.tail import AlreadyLogged, Position, batches, count_lines, lines_after, lines_before, step_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class MetricSource:
    """A file of metrics in a run's folder. In MLflow, the names of its metrics start with `prefix`."""

    name: str
    prefix: str
    is_truncated: bool = True
    """True if resuming the run removes lines from the file. The lines are removed before new lines are written."""


SOURCES = (
    MetricSource(f"pretrain/{FILE_NAME}", "pretrain/"),
    MetricSource(FILE_NAME, ""),
    MetricSource(f"{EVALUATIONS}/{FILE_NAME}", "evaluation/", is_truncated=False),
    MetricSource(system_metrics.FILE_NAME, system_metrics.PREFIX, is_truncated=False),
)


class MetricSender:
    """Sender of metrics to an MLflow run. It sends only metrics that the MLflow run does not have.

    The sync state of the run's folder contains the position up to which each file was sent.
    """

    def __init__(
        self, folder: Path, client: "MlflowClient", sender: BackgroundSender, sync_state: SyncState,
        save_state: Callable[[SyncState], None],
    ) -> None:  # fmt: skip
        """Create the sender. Nothing is sent yet.

        Args:
            folder: the run's folder.
            client: client of the MLflow store.
            sender: sender whose method `retry` repeats failed calls.
            sync_state: the current sync state of the folder, with the id of the MLflow run.
            save_state: function that is called with the new sync state after each change.
        """
        self.folder, self.client, self.sender = folder, client, sender
        self.sync_state, self._save_state = sync_state, save_state
        self.num_lines = 0
        """Number of lines in the batches that were sent. The number is shown to the user."""
        self._logged: dict[str, AlreadyLogged] = {}

    def send(self, *, truncated: bool = True) -> None:
        """Send the new metrics of all files.

        If `truncated` is False, skip the files from which lines may still be removed because the run is being resumed.
        """
        for source in SOURCES:
            if truncated or not source.is_truncated:
                self._send(source)

    def _send(self, source: MetricSource) -> None:
        from mlflow.entities import Metric

        path = self.folder / source.name
        while (lines := lines_after(path, self.sync_state.position(source.name))) != []:
            if lines is None:
                self._logged.pop(source.name, None)
                self._update_state(self.sync_state.with_position(source.name, Position()))
                continue
            logged = self._already_logged(source, min(step_of(line) for line in lines))
            for batch, points in batches(lines, source.prefix):
                if metrics := [Metric(*point) for point in logged.missing(points)]:
                    self.sender.retry(self.client.log_batch, self.sync_state.run_id, metrics=metrics)
                    self.num_lines += len(batch)
                position = self.sync_state.position(source.name).after(batch)
                self._update_state(self.sync_state.with_position(source.name, position))

    def _already_logged(self, source: MetricSource, step: int) -> AlreadyLogged:
        """Return a record of the points of a file that MLflow has from `step` on.

        MLflow is queried only if there is no earlier record of the file, or if the earlier record starts after `step`.
        """
        known = self._logged.get(source.name)
        if known is not None and step >= known.first_step:
            return known
        run_id, retry = self.sync_state.run_id, self.sender.retry
        names = [name for name in retry(self.client.get_run, run_id).data.metrics if prefix_of(name) == source.prefix]
        histories = (retry(self.client.get_metric_history, run_id, name) for name in names)
        counts = Counter((each.key, each.step) for history in histories for each in history if each.step >= step)
        logged = AlreadyLogged(counts, first_step=step)
        # Earlier lines of these steps were sent already. Their points must not be counted for the next lines.
        before = lines_before(self.folder / source.name, self.sync_state.position(source.name))
        for _, points in batches([line for line in before if step_of(line) >= step], source.prefix):
            logged.missing(points)
        self._logged[source.name] = logged
        return logged

    def _update_state(self, sync_state: SyncState) -> None:
        self._save_state(sync_state)
        self.sync_state = sync_state


def prefix_of(name: str) -> str:
    """Return the prefix of a metric's name in MLflow, which shows the file of the metric. It may be empty."""
    return next((source.prefix for source in SOURCES if source.prefix and name.startswith(source.prefix)), "")


def final_metrics(folder: Path) -> dict[str, tuple[float, int]]:
    """Return the value and the step of each metric that is known only at the end of a run.

    They are the loss of the best checkpoint, and pass@1 of the test problems, also at temperature 1 if it is known.
    """
    found: dict[str, tuple[float, int]] = {}
    if (best := read_best(folder)) is not None:
        found["best/val_loss"] = best["val/loss"], best["step"]
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    for name in ("pass@1", "sampled_pass@1"):
        if (passes := summary.get(name)) is not None:
            found[f"test/{name.replace('@', '_at_')}"] = passes["value"], summary["total_steps"]
    return found


def count_pending(folder: Path, sync_state: SyncState) -> tuple[int, int, list[Path]]:
    """Count the lines in the metric files of a run.

    Returns:
        The number of all lines, the number of lines that were not sent to MLflow, and the paths of the files.
    """
    counts = [count_lines(folder / source.name, sync_state.position(source.name)) for source in SOURCES]
    files = [folder / source.name for source in SOURCES if (folder / source.name).exists()]
    return sum(written for written, _ in counts), sum(pending for _, pending in counts), files
