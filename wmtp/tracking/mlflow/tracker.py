"""The tracker: when a run's metrics, artifacts and status are delivered to MLflow."""

import logging
import os
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.errors import PendingError
from wmtp.field_types import PositiveFloat
from wmtp.runtime.background import GOODBYE, IN_HASTE, Courier, described
from wmtp.runtime.locks import HeldByAnother, one_at_a_time
from wmtp.runtime.run_dir import read_run, read_status, typed
from wmtp.tracking.base import State
from wmtp.tracking.mlflow.artifacts import Choice, artifacts, best_address, read_best
from wmtp.tracking.mlflow.client import BYTES_PER_SECOND, connect, patience_for
from wmtp.tracking.mlflow.metric_sender import Sender, count_pending
from wmtp.tracking.mlflow.runs import (
    Mark,
    NewRun,
    described_by,
    missing_inputs,
    open_run,
    origin_tags,
    read_provenance,
)
from wmtp.tracking.mlflow.sweep_run import sweep_of, sweep_run
from wmtp.tracking.mlflow.sync_state import LOCK, Receipt, current_receipt, read_receipt
from wmtp.tracking.mlflow.uri import Address, absolute_uri, is_out_of_reach, is_server
from wmtp.tracking.system_metrics import FILE_NAME as SYSTEM
from wmtp.tracking.system_metrics import SystemSampler
from wmtp.tracking.tail import step_of

if TYPE_CHECKING:  # importing mlflow takes seconds: only the thread does it
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
BEST = "best/val_loss"
SECONDS_TO_MAKE_A_STORE = 60.0
"""For many processes that begin on one SQLite store, and wait for each other."""
RUN_TAG, CHECKPOINTS_TAG, PARENT = "wmtp.training.run", "wmtp.checkpoints", "mlflow.parentRunId"


class MlflowTracker:
    """Shows a run in MLflow. Training never waits for it: a thread follows metrics.jsonl and retries what fails.

    Every point of metrics.jsonl is sent once, whatever crashes: a run that is continued asks MLflow what it has.
    What a dead attempt sent beyond its checkpoint stays there too, as MLflow deletes nothing.
    """

    def __init__(
        self,
        folder: Path,
        run_name: str,
        parameters: dict[str, object],
        tags: dict[str, str],
        is_training: bool = True,
        *,
        uri: Address | None = None,
        experiment: str = "wmtp",
        poll_seconds: PositiveFloat = 1.0,
        stall_seconds: PositiveFloat = 30.0,
        close_seconds: PositiveFloat = 60.0,
        system_seconds: PositiveFloat | None = 10.0,
        checkpoints: Choice = "best",
    ) -> None:
        """Follow the run in `folder`; a run that mlflow.json names is continued, and where it was made is asked first.

        Without `uri`, the store is what MLFLOW_TRACKING_URI says, or `mlflow.db` in the `outputs` folder around the
        run, artifacts beside it. If the run is not training any more, it stays where mlflow.json says it is.

        Raises:
            InputError: the address holds a user or a password, or mlflow.json is damaged.
        """
        self.folder = Path(os.path.abspath(folder))
        known = read_receipt(self.folder)
        self.uri = absolute_uri(uri, self.folder) if is_training or known is None else known.uri
        self.run_name, self.parameters, self.tags, self.is_training = run_name, parameters, tags, is_training
        self.poll_seconds, self.stall_seconds, self.close_seconds = poll_seconds, stall_seconds, close_seconds
        self.system_seconds, self.checkpoints = system_seconds, checkpoints
        self._fresh = Receipt("", self.uri, experiment, run_name)
        self._receipt = known if known is not None and known.uri == self.uri else self._fresh
        if known is None:
            self._fresh.write(self.folder)
        self._state: State | None = None
        self._sent: list[str] = []
        self._logged = threading.Event()
        self._sampler: SystemSampler | None = None
        if is_training and system_seconds is not None:
            last = self._receipt.position(SYSTEM).last  # the file itself may have stayed on another machine
            self._sampler = SystemSampler(self.folder, system_seconds, step_of(last.encode()) + 1 if last else 0)
        self._courier = Courier(f"MLflow at {self.uri}", self._deliver)
        self._courier.start()

    @property
    def server(self) -> str:
        """Whom it tells."""
        return f"MLflow at {self.uri}"

    @property
    def report(self) -> str:
        """What was sent, in words, once the tracker is closed."""
        return f"MLflow: {', '.join(self._sent) or 'nothing was missing'}"

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Have the metrics sent from metrics.jsonl, which another tracker writes."""
        self._logged.set()

    def close(self, state: State | None) -> None:
        """Send the rest of the metrics, the final status (unless None: then it stays as it is) and the artifacts.

        A server that does not answer is waited for `stall_seconds` at most, and less by a training that did not finish;
        one that does answer `close_seconds`, and a second more for each megabyte of artifacts.

        Raises:
            PendingError: not all of it was acknowledged by then, or another process is delivering it.
        """
        self._state = state
        if self._sampler is not None:
            self._sampler.stop()
        there = artifacts(self.folder, self._kept_at(), self.checkpoints)
        num_bytes = sum(artifact.size() for artifact in there if artifact.name not in self._receipt.artifacts)
        patience, limit = self.stall_seconds, self.close_seconds + num_bytes / BYTES_PER_SECOND
        if self.is_training and state != "FINISHED":
            patience, limit = min(patience, IN_HASTE), min(limit, GOODBYE)
        for _ in self._courier.finish(patience, limit):
            pass
        if not self._courier.is_done:
            raise PendingError(self.left_behind())

    def left_behind(self) -> str:
        """What was not told, why, where it lies, and what sends it."""
        error, where = self._courier.last_error, typed(self.folder)
        if isinstance(error, HeldByAnother):
            return f"MLflow at {self.uri}: another process is delivering {where} now; what it leaves is sent later"
        written, pending, files = count_pending(self.folder, self._receipt)
        return (
            f"MLflow at {self.uri} did not take everything: {pending} of {written} lines of metrics are pending, and "
            f"so are the final status or artifacts. They are safe in {' and '.join(map(str, files)) or where}; "
            f"python -m wmtp.sync {shlex.quote(where)} sends them. "
            f"Last error: {described(error) if error else 'none, it was still busy'}"
        )

    def _deliver(self) -> None:
        """The thread: from opening the store to the final status."""
        retried = self._courier.retried
        with self._turn():
            self._receipt = current_receipt(self.folder, self._fresh)
            if not is_server(self.uri):
                self._courier.expect(SECONDS_TO_MAKE_A_STORE)
            client, experiment_id = retried(connect, self.uri, self._receipt.experiment or self._fresh.experiment)
            run = retried(self._open_run, client, experiment_id)
            if run.info.run_id != self._receipt.run_id:
                self._acknowledge(replace(self._fresh, run_id=run.info.run_id))
            self._describe(client, run, experiment_id)
            sender = Sender(self.folder, client, self._courier, self._receipt, self._acknowledge)
            while not self._courier.wait(self.poll_seconds):  # until it is known how the run ended
                if self.is_training:
                    sender.send(with_cut=self._logged.is_set())  # before, a file may hold lines that resuming will drop
            sender.send()
            self._note(sender.num_lines, "line of metrics", "lines of metrics")
            self._conclude(client, run)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Be the only one that delivers this folder: a training waits for its turn.

        Raises:
            HeldByAnother: it is not its turn, and it is not training or nobody waits for it any longer.
        """
        path = self.folder / LOCK
        with one_at_a_time(path, lambda: not self.is_training or self._courier.is_abandoned):
            yield

    def _open_run(self, client: "MlflowClient", experiment_id: str) -> "Run":
        """The run of this folder, which is going on if it trains."""
        identity = read_run(self.folder)
        mark = None if identity is None else Mark(RUN_TAG, identity["id"])
        run = open_run(client, experiment_id, self._receipt.run_id, NewRun(self.run_name, mark))
        if self.is_training and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _describe(self, client: "MlflowClient", run: "Run", experiment_id: str) -> None:
        """Send the parameters, tags and data that the run lacks, and whose child it is."""
        provenance, sweep, known = read_provenance(self.folder), sweep_of(self.folder), run.data.tags
        tags = origin_tags(provenance) | self.tags | {"wmtp.folder": str(self.folder)}
        if not self.is_training:  # this may be another machine than the one that trained
            tags = {name: text for name, text in tags.items() if name not in known}
        if sweep is not None and PARENT not in known:
            tags[PARENT] = self._courier.retried(
                sweep_run, client, experiment_id, sweep, replace(self._fresh, run_name=sweep.name)
            )
        params, changed = described_by(run, self.parameters, tags)
        if params or changed:
            # The client itself makes requests of a hundred of them, the most that a server takes.
            self._courier.retried(client.log_batch, run.info.run_id, params=params, tags=changed)
        if inputs := missing_inputs(run, provenance):
            self._courier.retried(client.log_inputs, run.info.run_id, inputs)

    def _conclude(self, client: "MlflowClient", run: "Run") -> None:
        """Send the best loss, the final status, and the artifacts that changed since they were sent."""
        retried, run_id = self._courier.retried, run.info.run_id
        best = read_best(self.folder)
        if best is not None and best["val/loss"] != run.data.metrics.get(BEST):
            now = int(time.time() * 1000)  # the same whenever it is tried, for the server to know it again
            retried(client.log_metric, run_id, BEST, best["val/loss"], timestamp=now, step=best["step"])
        # The status goes before the artifacts: they may go elsewhere, and fail when the server itself is well.
        state, ended = self._ending(run)
        if state is not None:
            retried(client.set_terminated, run_id, state, ended)
            self._sent.append(f"status {state}")
        num_sent = 0
        for artifact in artifacts(self.folder, self._kept_at(), self.checkpoints):
            fingerprint = artifact.fingerprint()
            if self._receipt.artifacts.get(artifact.name) != fingerprint:
                with patience_for(artifact.size()):
                    self._courier.expect(artifact.size() / BYTES_PER_SECOND)
                    retried(artifact.send, client, run_id)
                self._acknowledge(self._receipt.with_artifact(artifact.name, fingerprint))
                num_sent += 1
        self._note(num_sent, "artifact", "artifacts")
        address = best_address(self.folder, self._kept_at(), self.checkpoints)
        if address is not None and run.data.tags.get(CHECKPOINTS_TAG) != address:
            retried(client.set_tag, run_id, CHECKPOINTS_TAG, address)

    def _ending(self, run: "Run") -> tuple[State | None, int | None]:
        """The final status, if MLflow does not have it, and when the run ended, if that was before (ms since 1970)."""
        there = "RUNNING" if self.is_training else run.info.status
        if self.is_training or not (self.folder / "status.json").exists():
            return (self._state if self._state != there else None), None
        status = read_status(self.folder)
        was_made_now = not run.data.params and not run.data.metrics  # nobody else will say how it ended
        state = self._state or (status["state"] if was_made_now else None)
        ended = status["ended"] and int(datetime.fromisoformat(status["ended"]).timestamp() * 1000)
        return (state if state != there else None), ended

    def _kept_at(self) -> str | None:
        """Where checkpoints are to be had without MLflow: in S3 or, if the store is on this disk too, in the folder."""
        run = read_run(self.folder)
        if run is not None and run["remote"] is not None:
            return str(run["remote"])
        return None if is_server(self.uri) else str(self.folder)

    def _acknowledge(self, receipt: Receipt) -> None:
        self._courier.retried(receipt.write, self.folder)
        self._receipt = receipt

    def _note(self, count: int, one: str, many: str) -> None:
        if count:
            self._sent.append(f"{count:,} {one if count == 1 else many}")


def send_pending(folder: Path, state: State | None = None) -> str | None:
    """Send what an ended run's files hold and its MLflow run does not; what was sent, or None if it is not tracked.

    Raises:
        PendingError: not all of it was acknowledged.
        InputError: mlflow.json is damaged.
    """
    known = read_receipt(folder)
    if known is None:
        return None
    if is_out_of_reach(known.uri):
        log.warning("%s is tracked in %s, which is not on this machine; that is not told anything", folder, known.uri)
        return None
    # Which checkpoints are wanted is in the run's config, which is not known here.
    tracker = MlflowTracker(folder, known.run_name or folder.name, {}, {}, is_training=False, checkpoints="none")
    tracker.close(state)
    return tracker.report
