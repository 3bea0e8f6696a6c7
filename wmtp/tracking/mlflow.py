"""MLflow, fed from a run's metrics.jsonl files by a thread of its own. The only file that knows mlflow."""

import json
import logging
import os
import tempfile
import textwrap
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

from filelock import FileLock
from pydantic import Field
from tenacity import RetryCallState, Retrying, stop_when_event_set, wait_exponential

from wmtp.errors import PendingError
from wmtp.runtime.files import encode_json, replace_atomically
from wmtp.runtime.folder import EVALUATIONS
from wmtp.tracking.base import State
from wmtp.tracking.follow import Position, Stored, batches, clean_name, count_lines, lines_after
from wmtp.tracking.jsonl import FILE_NAME

if TYPE_CHECKING:  # importing mlflow takes seconds: only the thread does it
    from mlflow import MlflowClient
    from mlflow.entities import Run

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

log = logging.getLogger(__name__)
RECEIPT_NAME = "mlflow.json"
STAGE = "pretrain/"
FEEDS = {f"{STAGE}{FILE_NAME}": STAGE, FILE_NAME: "", f"{EVALUATIONS}/{FILE_NAME}": ""}
"""The files that are followed: of the stage before the training, the training and evaluations, by their prefix."""
ARTIFACTS = (
    "config.yaml", "summary.json", "samples.jsonl", "train.log",
    f"{STAGE}result.json", f"{STAGE}value_head.safetensors",
)  # fmt: skip
SQLITE = "sqlite:///"
PARAMETER_CHARACTERS = 6_000
TAG_CHARACTERS = 5_000
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
    """mlflow.json: which run belongs to a folder, and how far each of its files was sent."""

    run_id: str
    uri: str
    sent: dict[str, Position] = field(default_factory=dict)

    def position(self, name: str) -> Position:
        """How far a file was sent."""
        return self.sent.get(name, Position())

    def at(self, name: str, position: Position) -> "Receipt":
        """The receipt once a file was sent up to `position`."""
        return replace(self, sent=self.sent | {name: position})


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
        self._receipt = Receipt("", self.uri)
        self._state: State = "RUNNING"
        self._last_error: Exception | None = None
        self._delivered = False
        self._logged, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Have the metrics sent from metrics.jsonl, which another tracker writes."""
        self._logged.set()

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
        files = [self.folder / name for name in FEEDS if (self.folder / name).exists()] or [self.folder / FILE_NAME]
        counts = [count_lines(self.folder / name, self._receipt.position(name)) for name in FEEDS]
        written, pending = (sum(numbers) for numbers in zip(*counts, strict=True))
        error = described(self._last_error) if self._last_error else "none, it was still busy"
        return (
            f"MLflow at {self.uri} did not take everything within {self.close_seconds:g} s: {pending} of {written} "
            f"lines of metrics are pending, and so are the final status or artifacts. They are safe in "
            f"{' and '.join(str(file) for file in files)}. Last error: {error}"
        )

    def _deliver(self) -> None:
        """The thread: from opening the store to the final status."""
        try:
            self._receipt = read_receipt(self.folder, self.uri)
            client, experiment_id = self._retried(connect, self.uri, self.experiment)
            run = self._retried(self._open_run, client, experiment_id)
            stored: dict[str, Stored] = {}
            if run.info.run_id != self._receipt.run_id:
                self._acknowledge(Receipt(run.info.run_id, self.uri))
            self._describe(client, run)
            while not self._closing.wait(self.poll_seconds):
                if self._logged.is_set():  # before, a file may hold lines that resuming is about to drop
                    self._send(client, stored)
            self._send(client, stored)
            # The status goes first: artifacts may go elsewhere, and fail when the server itself is well.
            self._retried(client.set_terminated, run.info.run_id, self._state)
            for name in ARTIFACTS:
                if (self.folder / name).exists():
                    inside = name.rpartition("/")[0] or None
                    self._retried(client.log_artifact, run.info.run_id, str(self.folder / name), inside)
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

    def _send(self, client: "MlflowClient", stored: dict[str, Stored]) -> None:
        """Send what the files hold and MLflow has not; what it has of a file is asked when `stored` does not say."""
        from mlflow.entities import Metric

        for name, prefix in FEEDS.items():
            while (lines := lines_after(self.folder / name, self._receipt.position(name))) != []:
                if lines is None:
                    stored.pop(name, None)
                    self._acknowledge(self._receipt.at(name, Position()))
                    continue
                if name not in stored:
                    stored[name] = self._ask(client, prefix, json.loads(lines[0])["step"])
                for batch, points in batches(lines, prefix):
                    if metrics := [Metric(*point) for point in stored[name].missing(points)]:
                        self._retried(client.log_batch, self._receipt.run_id, metrics=metrics)
                    self._acknowledge(self._receipt.at(name, self._receipt.position(name).after(batch)))

    def _ask(self, client: "MlflowClient", prefix: str, first_step: int) -> Stored:
        """The points that MLflow has of a file; a dead attempt may have sent more of them than it could note."""
        stored, run_id = Stored(), self._receipt.run_id
        for name in self._retried(client.get_run, run_id).data.metrics:
            if name.startswith(STAGE) == (prefix == STAGE):
                for metric in self._retried(client.get_metric_history, run_id, name):
                    if metric.step >= first_step:
                        stored.add(name, metric.value, metric.step)
        return stored

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


def send_pending(folder: Path, state: State) -> str | None:
    """Send what the files of an ended run hold and its MLflow run does not; the store's address, if it has one.

    Raises:
        PendingError: not all of it was acknowledged.
    """
    path = folder / RECEIPT_NAME
    if not path.exists():
        return None
    tracker = MlflowTracker(folder, folder.name, {}, {}, uri=json.loads(path.read_text())["uri"])
    tracker.log(0, 0, {})
    tracker.close(state)
    return tracker.uri


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
        receipt = json.loads(path.read_text())
        if receipt["uri"] == uri:
            sent = {name: Position(**position) for name, position in receipt.get("sent", {}).items()}
            return Receipt(receipt["run_id"], uri, sent)
        log.warning("the run was tracked at %s; a new run is made at %s", receipt["uri"], uri)
    return Receipt("", uri)


def described(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 500)}"
