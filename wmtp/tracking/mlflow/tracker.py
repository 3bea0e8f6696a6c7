"""Send the metrics, the artifacts and the status of a run to MLflow from a background thread."""

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

from wmtp.errors import InputError, PendingError
from wmtp.field_types import PositiveFloat
from wmtp.runtime.background import SHUTDOWN_LIMIT_S, SHUTDOWN_STALL_S, BackgroundSender, format_error
from wmtp.runtime.destinations import remember_destinations
from wmtp.runtime.locks import LockHeld, file_lock
from wmtp.runtime.run_dir import display_path, read_run, read_status
from wmtp.tracking.base import State
from wmtp.tracking.mlflow.artifacts import CheckpointChoice, artifacts, best_location
from wmtp.tracking.mlflow.client import BYTES_PER_SECOND, connect, longer_timeout
from wmtp.tracking.mlflow.metric_sender import MetricSender, count_pending, final_metrics
from wmtp.tracking.mlflow.runs import (
    NewRun,
    UniqueTag,
    missing_inputs,
    missing_params_and_tags,
    open_run,
    origin_tags,
    read_provenance,
)
from wmtp.tracking.mlflow.sweep_run import open_sweep_run, sweep_folder
from wmtp.tracking.mlflow.sync_state import LOCK, SyncState, current_sync_state, read_sync_state, require_known_store
from wmtp.tracking.mlflow.uri import TrackingUri, absolute_uri, is_on_other_machine, is_server, resolve_experiment
from wmtp.tracking.system_metrics import FILE_NAME as SYSTEM
from wmtp.tracking.system_metrics import SystemSampler
from wmtp.tracking.tail import step_of

if TYPE_CHECKING:  # the import takes seconds: only the sending thread imports mlflow
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
CREATE_STORE_SECONDS = 60.0
"""Seconds that are added to the time limits for an SQLite file. Processes that open it at once wait for each other."""
RUN_TAG, CHECKPOINTS_TAG, PARENT = "wmtp.run", "wmtp.checkpoints", "mlflow.parentRunId"


class MlflowTracker:
    """Tracker that sends a run to MLflow from a background thread. Training does not wait for the thread.

    The thread reads new lines of metrics.jsonl and repeats failed requests. When a run is resumed after a crash, the
    thread asks MLflow which metric values it has, so that no value is sent twice. MLflow cannot delete values. So if a
    crash occurs after a checkpoint, MLflow keeps the values that were sent between the checkpoint and the crash.
    """

    def __init__(
        self,
        folder: Path,
        run_name: str,
        parameters: dict[str, object],
        tags: dict[str, str],
        is_training: bool = True,
        *,
        uri: TrackingUri | None = None,
        experiment: str | None = None,
        poll_seconds: PositiveFloat = 1.0,
        stall_seconds: PositiveFloat = 30.0,
        close_seconds: PositiveFloat = 60.0,
        system_seconds: PositiveFloat | None = 10.0,
        checkpoints: CheckpointChoice = "best",
    ) -> None:
        """Start the background thread.

        If the mlflow.json in the run's folder contains an MLflow run in the same store, that MLflow run is continued.

        Args:
            folder: the run's folder.
            run_name: name of the MLflow run if a new one is created.
            parameters: the config as a flat dictionary. Its keys are dotted, such as `tracking.uri`.
            tags: tags that the user has set.
            is_training: True if this process trains the run. If it is False, the pending data of an ended run are sent
                to the store whose URI is in mlflow.json.
            uri: tracking URI; see `absolute_uri` for None.
            experiment: name of the MLflow experiment; see `resolve_experiment` for None.
            poll_seconds: seconds between two searches for new metrics.
            stall_seconds: maximum seconds that `close` waits for a store that does not respond.
            close_seconds: maximum seconds that `close` waits for a store that responds.
            system_seconds: seconds between two samples of system metrics. None records no system metrics.
            checkpoints: `best` to send the best checkpoint as artifacts, `none` to send no checkpoint.

        Raises:
            InputError: MLflow cannot store runs at the URI, the URI contains a user or a password, or mlflow.json is
                damaged.
        """
        self.folder = Path(os.path.abspath(folder))
        known = read_sync_state(self.folder)
        self.uri = absolute_uri(uri, self.folder) if is_training or known is None else known.uri
        self.run_name, self.parameters, self.tags, self.is_training = run_name, parameters, tags, is_training
        self.poll_seconds, self.stall_seconds, self.close_seconds = poll_seconds, stall_seconds, close_seconds
        self.system_seconds, self.checkpoints = system_seconds, checkpoints
        self._initial = SyncState("", self.uri, resolve_experiment(experiment), run_name=run_name)
        self._sync_state = known if known is not None and known.uri == self.uri else self._initial
        if known is None:
            self._initial.write(self.folder)
        if is_training:  # the command has checked that the user has chosen it
            remember_destinations([self.uri])
        self._final_state: State | None = None
        self._sent: list[str] = []
        self._training_started = threading.Event()
        self._sampler: SystemSampler | None = None
        if is_training and system_seconds is not None:
            last = self._sync_state.position(SYSTEM).last  # the file itself may be on another machine
            self._sampler = SystemSampler(self.folder, system_seconds, step_of(last.encode()) + 1 if last else 0)
        self._sender = BackgroundSender(f"MLflow at {self.uri}", self._send)
        self._sender.start()

    @property
    def server(self) -> str:
        """Name and URI of the MLflow store, for use in messages."""
        return f"MLflow at {self.uri}"

    @property
    def report(self) -> str:
        """Message that says which data were sent. It is complete after `close` has returned."""
        return f"MLflow: {', '.join(self._sent) or 'nothing was missing'}"

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Record that training has started. The background thread reads the metrics from metrics.jsonl."""
        self._training_started.set()

    def close(self, state: State | None) -> None:
        """Send the remaining metrics, the final status and the artifacts.

        For a server that does not respond, the method waits `stall_seconds` at most. For a server that responds, it
        waits `close_seconds` at most, plus one second for each megabyte of artifacts. Both limits are shorter if
        training did not finish.

        Args:
            state: final status of the run. If it is None and MLflow already has data of the run, the status that MLflow
                has is kept.

        Raises:
            PendingError: some data were not sent in time, or another process is sending the data of this run.
        """
        self._final_state = state
        if self._sampler is not None:
            self._sampler.stop()
        found = artifacts(self.folder, self._stored_at(), self.checkpoints)
        num_bytes = sum(artifact.size() for artifact in found if artifact.name not in self._sync_state.artifacts)
        stall, limit = self.stall_seconds, self.close_seconds + num_bytes / BYTES_PER_SECOND
        if self.is_training and state != "FINISHED":
            stall, limit = min(stall, SHUTDOWN_STALL_S), min(limit, SHUTDOWN_LIMIT_S)
        if not self._sender.wait_until_done(stall, limit):
            raise PendingError(self.unsent())

    def unsent(self) -> str:
        """Return a message about the data that were not sent.

        The message contains the number of unsent lines, the files that contain them, a command that sends them, and the
        last error.
        """
        error, where = self._sender.last_error, display_path(self.folder)
        if isinstance(error, LockHeld):
            return f"MLflow at {self.uri}: another process is sending {where}; wmtp.sync sends the rest later"
        written, pending, files = count_pending(self.folder, self._sync_state)
        return (
            f"MLflow at {self.uri} did not accept everything: {pending} of {written} lines of metrics are pending, and "
            f"so are the final status or artifacts. They are stored in {' and '.join(map(str, files)) or where}; "
            f"`python -m wmtp.sync {shlex.quote(where)}` sends them. "
            f"Last error: {format_error(error) if error else 'none, a request was still running'}"
        )

    def _send(self) -> None:
        """Send all data of the run: parameters, metrics, status and artifacts.

        This method runs in the background thread until the run ends.
        """
        retry = self._sender.retry
        with self._send_lock():
            self._sync_state = current_sync_state(self.folder, self._initial)
            if not is_server(self.uri):
                self._sender.extend_deadline(CREATE_STORE_SECONDS)
            client, experiment_id = retry(connect, self.uri, self._sync_state.experiment or self._initial.experiment)
            run = retry(self._open_run, client, experiment_id)
            if run.info.run_id != self._sync_state.run_id:
                self._save_state(replace(self._initial, run_id=run.info.run_id, experiment_id=experiment_id))
            self._send_metadata(client, run, experiment_id)
            metrics = MetricSender(self.folder, client, self._sender, self._sync_state, self._save_state)
            while not self._sender.wait(self.poll_seconds):  # until the final status is known
                if self.is_training:
                    metrics.send(truncated=self._training_started.is_set())  # before, a resume may truncate the files
            metrics.send()
            self._count_sent(metrics.num_lines, "line of metrics", "lines of metrics")
            self._send_final_state(client, run)

    @contextmanager
    def _send_lock(self) -> Iterator[None]:
        """Hold a lock while the context is active, so that no other process sends the data of this run.

        A process that trains the run waits for the lock.

        Raises:
            LockHeld: another process holds the lock. This process either does not train the run, or sending was
                cancelled while it waited.
        """
        path = self.folder / LOCK
        with file_lock(path, lambda: not self.is_training or self._sender.is_cancelled):
            yield

    def _open_run(self, client: "MlflowClient", experiment_id: str) -> "Run":
        """Find or create the MLflow run of this folder. If this process trains the run, set the status to RUNNING."""
        local_run = read_run(self.folder)
        tag = None if local_run is None else UniqueTag(RUN_TAG, local_run["id"])
        run = open_run(client, experiment_id, self._sync_state.run_id, NewRun(self.run_name, tag))
        if self.is_training and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _send_metadata(self, client: "MlflowClient", run: "Run", experiment_id: str) -> None:
        """Send the parameters, tags and data sets that the MLflow run does not have.

        If the run belongs to a sweep, the id of the sweep's MLflow run is sent as the parent run.
        """
        provenance, sweep, known = read_provenance(self.folder), sweep_folder(self.folder), run.data.tags
        tags = origin_tags(provenance) | self.tags | {"wmtp.folder": str(self.folder)}
        if not self.is_training:  # this machine may be another one than the machine of the training
            tags = {name: text for name, text in tags.items() if name not in known}
        if sweep is not None and PARENT not in known:
            tags[PARENT] = self._sender.retry(
                open_sweep_run, client, experiment_id, sweep, replace(self._initial, run_name=sweep.name)
            )
        params, changed = missing_params_and_tags(run, self.parameters, tags)
        if params or changed:
            # The client splits the tags into requests with one hundred tags, the maximum of a server.
            self._sender.retry(client.log_batch, run.info.run_id, params=params, tags=changed)
        if inputs := missing_inputs(run, provenance):
            self._sender.retry(client.log_inputs, run.info.run_id, inputs)

    def _send_final_state(self, client: "MlflowClient", run: "Run") -> None:
        """Send the best validation loss, pass@1, the final status, and all artifacts that are new or have changed."""
        retry, run_id = self._sender.retry, run.info.run_id
        now = int(time.time() * 1000)  # equal in all attempts, so that the server can detect a repeated request
        for name, (value, step) in final_metrics(self.folder).items():
            if value != run.data.metrics.get(name):
                retry(client.log_metric, run_id, name, value, timestamp=now, step=step)
        # Status first: artifacts may go to another server and fail while the tracking server works.
        state, ended = self._status_to_send(run)
        if state is not None:
            retry(client.set_terminated, run_id, state, ended)
            self._sent.append(f"status {state}")
        num_sent = 0
        for artifact in artifacts(self.folder, self._stored_at(), self.checkpoints):
            fingerprint = artifact.fingerprint()
            if self._sync_state.artifacts.get(artifact.name) != fingerprint:
                with longer_timeout(artifact.size()):
                    self._sender.extend_deadline(artifact.size() / BYTES_PER_SECOND)
                    retry(artifact.send, client, run_id)
                self._save_state(self._sync_state.with_artifact(artifact.name, fingerprint))
                num_sent += 1
        self._count_sent(num_sent, "artifact", "artifacts")
        location = best_location(self.folder, self._stored_at(), self.checkpoints)
        if location is not None and run.data.tags.get(CHECKPOINTS_TAG) != location:
            retry(client.set_tag, run_id, CHECKPOINTS_TAG, location)

    def _status_to_send(self, run: "Run") -> tuple[State | None, int | None]:
        """Return the final status and the end time that are sent to MLflow.

        The status is None if the status in MLflow does not change. The end time is in milliseconds since 1970. If it is
        None, MLflow uses the current time.
        """
        current = "RUNNING" if self.is_training else run.info.status
        if self.is_training or not (self.folder / "status.json").exists():
            return (self._final_state if self._final_state != current else None), None
        status = read_status(self.folder)
        is_new = not run.data.params and not run.data.metrics  # so no other process has set the status
        state = self._final_state or (status["state"] if is_new else None)
        ended = status["ended"] and int(datetime.fromisoformat(status["ended"]).timestamp() * 1000)
        return (state if state != current else None), ended

    def _stored_at(self) -> str | None:
        """Return the location of the run's checkpoints outside of MLflow.

        This is the S3 URL of the run. For a run without S3 URL, it is the run's folder if the MLflow store is a local
        file, and None if it is a server.
        """
        run = read_run(self.folder)
        if run is not None and run["remote"] is not None:
            return str(run["remote"])
        return None if is_server(self.uri) else str(self.folder)

    def _save_state(self, sync_state: SyncState) -> None:
        self._sender.retry(sync_state.write, self.folder)
        self._sync_state = sync_state

    def _count_sent(self, count: int, singular: str, plural: str) -> None:
        if count:
            self._sent.append(f"{count:,} {singular if count == 1 else plural}")


def send_pending(folder: Path, state: State | None = None) -> str | None:
    """Send the data of an ended run that MLflow did not receive during training.

    Args:
        folder: the run's folder.
        state: final status of the run. If it is None and MLflow already has data of the run, the status that MLflow has
            is kept.

    Returns:
        A message that says which data were sent. None if the run is not tracked with MLflow, or if its MLflow store is
        a file on another machine or one that this user has not used before.

    Raises:
        PendingError: some data were not sent.
        InputError: mlflow.json is damaged.
    """
    known = read_sync_state(folder)
    if known is None:
        return None
    if is_on_other_machine(known.uri):
        log.warning("%s is tracked in %s, which is not on this machine; nothing is sent there", folder, known.uri)
        return None
    try:
        require_known_store(folder)
    except InputError as error:
        log.warning("%s; nothing is sent there", error)
        return None
    # The config, which has `tracking.checkpoints`, is not available here.
    tracker = MlflowTracker(folder, known.run_name or folder.name, {}, {}, is_training=False, checkpoints="none")
    tracker.close(state)
    return tracker.report
