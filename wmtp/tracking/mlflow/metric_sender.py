"""The files of a run that grow, and sending each of their points once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.runtime.background import Courier
from wmtp.runtime.run_dir import EVALUATIONS
from wmtp.tracking import system_metrics
from wmtp.tracking.jsonl import FILE_NAME
from wmtp.tracking.mlflow.sync_state import Receipt
from wmtp.tracking.tail import Position, Stored, batches, count_lines, lines_after, lines_before, step_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Feed:
    """A file of a run's folder that is followed; its metrics' names begin with `group`."""

    name: str
    group: str
    is_cut: bool = True
    """Whether resuming drops lines of it, before it writes the first new one."""


FEEDS = (
    Feed(f"pretrain/{FILE_NAME}", "pretrain/"),
    Feed(FILE_NAME, ""),
    Feed(f"{EVALUATIONS}/{FILE_NAME}", "evaluation/", is_cut=False),
    Feed(system_metrics.FILE_NAME, system_metrics.GROUP, is_cut=False),
)


class Sender:
    """Sends the points of a run's files that its MLflow run has not, and notes in the receipt how far it came."""

    def __init__(
        self, folder: Path, client: "MlflowClient", courier: Courier, receipt: Receipt,
        acknowledge: Callable[[Receipt], None],
    ) -> None:  # fmt: skip
        """`acknowledge` keeps a new receipt."""
        self.folder, self.client, self.courier = folder, client, courier
        self.receipt, self._keep = receipt, acknowledge
        self.num_lines = 0
        """How many lines were sent that MLflow did not have whole."""
        self._stored: dict[str, Stored] = {}

    def send(self, *, with_cut: bool = True) -> None:
        """Send what is new; without `with_cut`, only of files that are never cut."""
        for feed in FEEDS:
            if with_cut or not feed.is_cut:
                self._send(feed)

    def _send(self, feed: Feed) -> None:
        from mlflow.entities import Metric

        path = self.folder / feed.name
        while (lines := lines_after(path, self.receipt.position(feed.name))) != []:
            if lines is None:
                self._stored.pop(feed.name, None)
                self._acknowledge(self.receipt.at(feed.name, Position()))
                continue
            stored = self._stored_from(feed, min(step_of(line) for line in lines))
            for batch, points in batches(lines, feed.group):
                if metrics := [Metric(*point) for point in stored.missing(points)]:
                    self.courier.retried(self.client.log_batch, self.receipt.run_id, metrics=metrics)
                    self.num_lines += len(batch)
                self._acknowledge(self.receipt.at(feed.name, self.receipt.position(feed.name).after(batch)))

    def _stored_from(self, feed: Feed, step: int) -> Stored:
        """What MLflow has of a file from a step on; it is asked once, unless the steps go back."""
        known = self._stored.get(feed.name)
        if known is not None and step >= known.first_step:
            return known
        stored = Stored(step)
        for name in self.courier.retried(self.client.get_run, self.receipt.run_id).data.metrics:
            if group_of(name) == feed.group:
                for metric in self.courier.retried(self.client.get_metric_history, self.receipt.run_id, name):
                    stored.add(name, metric.step)
        # What these lines hold of the same steps was sent already, and is not what the next lines hold.
        before = lines_before(self.folder / feed.name, self.receipt.position(feed.name))
        for _, points in batches([line for line in before if step_of(line) >= step], feed.group):
            stored.missing(points)
        self._stored[feed.name] = stored
        return stored

    def _acknowledge(self, receipt: Receipt) -> None:
        self._keep(receipt)
        self.receipt = receipt


def group_of(name: str) -> str:
    """The group of the file that a metric comes from."""
    return next((feed.group for feed in FEEDS if feed.group and name.startswith(feed.group)), "")


def count_pending(folder: Path, receipt: Receipt) -> tuple[int, int, list[Path]]:
    """How many lines a folder's files hold, how many of them were not sent, and the files."""
    counts = [count_lines(folder / feed.name, receipt.position(feed.name)) for feed in FEEDS]
    files = [folder / feed.name for feed in FEEDS if (folder / feed.name).exists()]
    return sum(written for written, _ in counts), sum(pending for _, pending in counts), files
