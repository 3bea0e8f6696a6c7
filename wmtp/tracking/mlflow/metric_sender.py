"""Send the metrics in the files of a run to MLflow while the files grow. Each point is sent once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.runtime.background import BackgroundSender
from wmtp.runtime.run_dir import EVALUATIONS
from wmtp.tracking import system_metrics
from wmtp.tracking.jsonl import FILE_NAME
from wmtp.tracking.mlflow.sync_state import SyncState
from wmtp.tracking.tail import AlreadyLogged, Position, batches, count_lines, lines_after, lines_before, step_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class MetricSource:
    """A file of metrics in a run's folder. The names of its metrics in MLflow start with `prefix`."""

    name: str
    prefix: str
    is_truncated: bool = True
    """Whether lines are removed when a run is resumed. They are removed before the first new line is written."""


SOURCES = (
    MetricSource(f"pretrain/{FILE_NAME}", "pretrain/"),
    MetricSource(FILE_NAME, ""),
    MetricSource(f"{EVALUATIONS}/{FILE_NAME}", "evaluation/", is_truncated=False),
    MetricSource(system_metrics.FILE_NAME, system_metrics.PREFIX, is_truncated=False),
)


class MetricSender:
    """Sender of the metrics that an MLflow run does not have. The sync state records the position in each file."""

    def __init__(
        self, folder: Path, client: "MlflowClient", sender: BackgroundSender, sync_state: SyncState,
        save_state: Callable[[SyncState], None],
    ) -> None:  # fmt: skip
        """Create the sender. Nothing is sent yet.

        Args:
            folder: the run's folder.
            client: client of the MLflow store.
            sender: repeats failed calls.
            sync_state: the current sync state of the folder.
            save_state: called with each new sync state.
        """
        self.folder, self.client, self.sender = folder, client, sender
        self.sync_state, self._save_state = sync_state, save_state
        self.num_lines = 0
        """Number of lines in sent batches, for the report."""
        self._logged: dict[str, AlreadyLogged] = {}

    def send(self, *, truncated: bool = True) -> None:
        """Send the new points of all files. With `truncated=False`, skip files that a resume may truncate."""
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
        """Return the points of a file that MLflow has from `step` on. Query MLflow again only if steps decrease."""
        known = self._logged.get(source.name)
        if known is not None and step >= known.first_step:
            return known
        logged = AlreadyLogged(step)
        for name in self.sender.retry(self.client.get_run, self.sync_state.run_id).data.metrics:
            if prefix_of(name) == source.prefix:
                for metric in self.sender.retry(self.client.get_metric_history, self.sync_state.run_id, name):
                    logged.add(name, metric.step)
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
    """Return the prefix of the source of a metric, or an empty string."""
    return next((source.prefix for source in SOURCES if source.prefix and name.startswith(source.prefix)), "")


def count_pending(folder: Path, sync_state: SyncState) -> tuple[int, int, list[Path]]:
    """Return the number of lines in the metric files of a folder, the number of unsent lines, and the files."""
    counts = [count_lines(folder / source.name, sync_state.position(source.name)) for source in SOURCES]
    files = [folder / source.name for source in SOURCES if (folder / source.name).exists()]
    return sum(written for written, _ in counts), sum(pending for _, pending in counts), files
