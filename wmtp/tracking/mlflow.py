"""MLflow, fed from metrics.jsonl by a thread of its own. The only file that knows mlflow."""

import json
import logging
import os
import re
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

from filelock import FileLock
from pydantic import Field
from tenacity import RetryCallState, Retrying, stop_when_event_set, wait_exponential

from wmtp.errors import PendingError
from wmtp.runtime.files import encode_json, replace_atomically
from wmtp.tracking.base import State
from wmtp.tracking.jsonl import FILE_NAME

if TYPE_CHECKING:  # importing mlflow takes seconds: only the thread does it
    from mlflow import MlflowClient
    from mlflow.entities import Run

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Value = tuple[str, float, int, int]
"""A metric as mlflow takes it: name, value, milliseconds since 1970, step."""

log = logging.getLogger(__name__)
RECEIPT_NAME = "mlflow.json"
ARTIFACTS = ("config.yaml", "summary.json", "samples.jsonl", "train.log")
NOT_METRICS = ("step", "epoch", "time")
SQLITE = "sqlite:///"
METRICS_PER_CALL = 500
PARAMETER_CHARACTERS = 6_000
TAG_CHARACTERS = 5_000
NAME_CHARACTERS = 250
BYTES_PER_READ = 1_000_000
PAUSE_WHILE_CLOSING = 1.0
ENVIRONMENT = {
    # With mlflow's own settings, one call to a dead server blocks for four minutes; retrying is done here.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What mlflow is told, unless the user says otherwise."""


@dataclass(frozen=True)
class Receipt:
    """mlflow.json: which run belongs to a folder, and how many lines of metrics.jsonl it has."""

    run_id: str
    uri: str
    sent_lines: int


class Lines:
    """The whole lines of a growing file, each given once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.count = 0

    def read(self) -> list[bytes]:
        """The next lines, about a megabyte at most; a line that is still being written is left for later."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            lines = [line for line in file.readlines(BYTES_PER_READ) if line.endswith(b"\n")]
        self.offset += sum(len(line) for line in lines)
        self.count += len(lines)
        return lines


class MlflowTracker:
    """Shows a run in MLflow. Training never waits for it: a thread follows metrics.jsonl and retries what fails."""

    def __init__(
        self,
        folder: Path,
        run_name: str,
        parameters: dict[str, object],
        tags: dict[str, str],
        *,
        uri: str | None = None,
        experiment: str = "wmtp",
        poll_seconds: Annotated[float, Field(gt=0)] = 1.0,
        close_seconds: Annotated[float, Field(gt=0)] = 60.0,
    ) -> None:
        """Follow the run in `folder`; a run that mlflow.json names is continued.

        Without `uri`, the store is `mlflow.db` in the `outputs` folder around the run, artifacts beside it.
        """
        self.folder = Path(os.path.abspath(folder))
        self.uri = absolute_uri(uri, self.folder)
        self.run_name, self.parameters, self.tags = run_name, parameters, tags
        self.experiment, self.poll_seconds, self.close_seconds = experiment, poll_seconds, close_seconds
        self._receipt = Receipt("", self.uri, 0)
        self._state: State = "RUNNING"
        self._last_error: Exception | None = None
        self._delivered = False
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Do nothing: the metrics are sent from metrics.jsonl, which another tracker writes."""

    def close(self, state: State) -> None:
        """Send the rest of metrics.jsonl, the final status and the artifacts.

        Raises:
            PendingError: not all of it was acknowledged within `close_seconds`.
        """
        self._state = state
        self._closing.set()
        try:
            self._thread.join(self.close_seconds)
        finally:
            self._abandoned.set()
        if not self._delivered:
            raise PendingError(self._pending())

    def _pending(self) -> str:
        path = self.folder / FILE_NAME
        written = path.read_bytes().count(b"\n") if path.exists() else 0
        pending = max(0, written - self._receipt.sent_lines)
        error = described(self._last_error) if self._last_error else "none, it was still busy"
        return (
            f"MLflow at {self.uri} did not take everything within {self.close_seconds:g} s: {pending} of {written} "
            f"lines of metrics are pending, and so are the final status or artifacts. They are safe in {path}. "
            f"Last error: {error}"
        )

    def _deliver(self) -> None:
        """The thread: from opening the store to the final status."""
        try:
            self._receipt = read_receipt(self.folder, self.uri)
            client, experiment_id = self._retried(connect, self.uri, self.experiment)
            run = self._retried(self._open_run, client, experiment_id)
            if run.info.run_id != self._receipt.run_id:
                self._acknowledge(Receipt(run.info.run_id, self.uri, 0))
            self._describe(client, run)
            lines = Lines(self.folder / FILE_NAME)
            while not self._closing.is_set():
                self._send(client, lines)
                self._closing.wait(self.poll_seconds)
            self._send(client, lines)
            # The status goes first: artifacts may go elsewhere, and fail when the server itself is well.
            self._retried(client.set_terminated, run.info.run_id, self._state)
            for name in ARTIFACTS:
                if (self.folder / name).exists():
                    self._retried(client.log_artifact, run.info.run_id, str(self.folder / name))
            self._delivered = True
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to; close() reports it
            self._last_error = error
            log.warning("MLflow was not told everything: %s", described(error))

    def _open_run(self, client: "MlflowClient", experiment_id: str) -> "Run":
        """The run to continue, or a new one if there is none or somebody deleted it."""
        from mlflow.exceptions import MlflowException

        if run_id := self._receipt.run_id:
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("MLflow knows nothing of run %s, a new one is made: %s", run_id, described(error))
            else:
                if run.info.lifecycle_stage == "active":
                    client.update_run(run_id, status="RUNNING")
                    return run
                log.warning("run %s was deleted in MLflow, a new one is made", run_id)
        return client.create_run(experiment_id, run_name=self.run_name)

    def _describe(self, client: "MlflowClient", run: "Run") -> None:
        """Parameters and tags. MLflow's parameters cannot change: one that did becomes a tag `resumed.<name>`."""
        from mlflow.entities import Param, RunTag

        parameters: dict[str, str] = {}
        tags = {clean_name(name): value for name, value in self.tags.items()} | {"wmtp.folder": str(self.folder)}
        for name, value in self.parameters.items():
            key, text = clean_name(name), str(value)[:PARAMETER_CHARACTERS]
            changed = clean_name(f"resumed.{key}")
            if key not in run.data.params:
                parameters[key] = text
            elif run.data.params[key] != text or changed in run.data.tags:
                tags[changed] = text
        self._retried(  # the client itself makes requests of a hundred of them, the most that a server takes
            client.log_batch,
            run.info.run_id,
            params=[Param(key, text) for key, text in parameters.items()],
            tags=[RunTag(key, text[:TAG_CHARACTERS]) for key, text in tags.items()],
        )

    def _send(self, client: "MlflowClient", lines: Lines) -> None:
        """Send the lines that were written since the last time and are not acknowledged."""
        from mlflow.entities import Metric

        while read := lines.read():
            already_sent = max(0, self._receipt.sent_lines - (lines.count - len(read)))
            for num_lines, values in batches(read[already_sent:]):
                metrics = [Metric(*value) for value in values]
                self._retried(client.log_batch, self._receipt.run_id, metrics=metrics)
                self._acknowledge(replace(self._receipt, sent_lines=self._receipt.sent_lines + num_lines))

    def _acknowledge(self, receipt: Receipt) -> None:
        self._retried(replace_atomically, self.folder / RECEIPT_NAME, encode_json(asdict(receipt)))
        self._receipt = receipt

    def _retried(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The call's result, tried until it succeeds or close() gave up; then its last exception is raised."""
        retrying = Retrying(
            stop=stop_when_event_set(self._abandoned),
            wait=wait_exponential(multiplier=0.5, max=30),
            sleep=self._pause,
            after=self._note_failure,
            reraise=True,
        )
        result = retrying(call, *args, **kwargs)
        self._last_error = None
        return result

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; close() ends the pause, and from then on pauses are short."""
        if self._closing.is_set():
            self._abandoned.wait(min(seconds, PAUSE_WHILE_CLOSING))
        else:
            self._closing.wait(seconds)

    def _note_failure(self, attempt: RetryCallState) -> None:
        """Log a failed attempt: a call's first as a warning, which a terminal shows, its others for the log file."""
        error = attempt.outcome.exception() if attempt.outcome else None
        if isinstance(error, Exception):
            self._last_error = error
            level = logging.WARNING if attempt.attempt_number == 1 else logging.INFO
            log.log(level, "MLflow at %s failed and is tried again, training goes on: %s", self.uri, described(error))


def clean_name(name: str) -> str:
    """The nearest name that MLflow allows for a metric, parameter or tag."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)[:NAME_CHARACTERS]
    # MLflow refuses what is not a normalised relative path.
    parts = ["_" if part in (".", "..") else part for part in allowed.split("/") if part]
    cleaned = "/".join(parts) or "_"
    return f"_{cleaned[2:]}" if cleaned.startswith("..") else cleaned


def metric_values(line: dict[str, float | str]) -> list[Value]:
    """The metrics of a line of metrics.jsonl; those not finite, which stand there as strings, are counted."""
    timestamp, step = int(float(line["time"]) * 1000), int(line["step"])
    metrics = {name: value for name, value in line.items() if name not in NOT_METRICS}
    values = [
        (clean_name(name), float(value), timestamp, step)
        for name, value in metrics.items()
        if not isinstance(value, str)
    ]
    if not_finite := len(metrics) - len(values):
        values.append(("nonfinite", float(not_finite), timestamp, step))
    return values


def batches(lines: Sequence[bytes]) -> Iterator[tuple[int, list[Value]]]:
    """As many whole lines at a time as a call may hold, with their number; a longer line stands alone."""
    num_lines, values = 0, list[Value]()
    for line in lines:
        more = metric_values(json.loads(line))
        if num_lines and len(values) + len(more) > METRICS_PER_CALL:
            yield num_lines, values
            num_lines, values = 0, []
        num_lines += 1
        values += more
    if num_lines:
        yield num_lines, values


def absolute_uri(uri: str | None, folder: Path) -> str:
    """Where the store is, whatever the current directory becomes."""
    if uri is None:
        outputs = next((parent for parent in folder.parents if parent.name == "outputs"), folder.parent)
        return f"{SQLITE}{outputs / 'mlflow.db'}"
    return f"{SQLITE}{os.path.abspath(uri.removeprefix(SQLITE))}" if uri.startswith(SQLITE) else uri


def connect(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """A client and the id of the experiment; a local store and the experiment are made if they are not there."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of each retry by itself
    from mlflow import MlflowClient

    database = Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    # Processes that make the store at the same time break it.
    with FileLock(f"{database}.lock", timeout=60) if database else nullcontext():
        if database and not database.exists():
            create_store(database)
        client = MlflowClient(tracking_uri=uri)
        if known := client.get_experiment_by_name(experiment):
            return client, known.experiment_id
        artifacts = (database.parent / "mlartifacts").as_uri() if database else None
        return client, client.create_experiment(experiment, artifact_location=artifacts)


def create_store(database: Path) -> None:
    """A new SQLite store, which appears whole: one that a killed process left half made could not be used."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".mlflow-") as staging:
        staged = Path(staging) / database.name
        MlflowClient(tracking_uri=f"{SQLITE}{staged}").search_experiments(max_results=1)
        os.replace(staged, database)


def read_receipt(folder: Path, uri: str) -> Receipt:
    """What mlflow.json says; an empty receipt if there is none, or it is of another store."""
    path = folder / RECEIPT_NAME
    if path.exists():
        receipt = Receipt(**json.loads(path.read_text()))
        if receipt.uri == uri:
            return receipt
        log.warning("the run was tracked at %s; a new run is made at %s", receipt.uri, uri)
    return Receipt("", uri, 0)


def described(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 500)}"
