"""Reaching an MLflow store: a server, which is asked beforehand, or SQLite, which is made where it is not there."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.errors import InputError
from wmtp.runtime.background import described
from wmtp.runtime.locks import one_at_a_time
from wmtp.runtime.processes import answers_within
from wmtp.tracking.mlflow.uri import CREDENTIALS, PASSWORD, SQLITE, USERNAME, configured, is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
ENVIRONMENT = {
    # With mlflow's own settings, one call to a dead server blocks for four minutes, and a run whose making was
    # answered too late is made twice; retrying is done here.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    TIMEOUT: "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""What mlflow is told, unless the user says otherwise."""
CHECK_SECONDS = 9.0
BYTES_PER_SECOND = 1e6
"""The slowest that artifacts are expected to travel."""
TOO_LONG = "x" * 251
"""No tag may have a name of this length: asking for it changes nothing, and shows whether one might be set."""
OVERLOADED = (408, 429)


class ServerUnreachable(OSError):
    """An MLflow server does not answer, or not now."""


def prepare() -> None:
    """Tell mlflow how to behave; must come before it is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of each retry by itself


def connect(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """A client and the id of the experiment; a local store and the experiment are made if they are not there."""
    prepare()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    # Processes that make the store at the same time break it.
    with one_at_a_time(Path(f"{database}.lock")) if database else nullcontext():
        if database and not database.exists():
            create_store(database)
        client = MlflowClient(tracking_uri=uri)
        if known := client.get_experiment_by_name(experiment):
            return client, known.experiment_id
        artifacts = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client, client.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made_by_another = client.get_experiment_by_name(experiment)
        assert made_by_another is not None
        return client, made_by_another.experiment_id


def create_store(database: Path) -> None:
    """A new SQLite store, which appears whole: one that a killed process left half made could not be used."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".mlflow-") as staging:
        staged = Path(staging) / database.name
        MlflowClient(tracking_uri=f"{SQLITE}{staged}").search_experiments(max_results=1)
        os.replace(staged, database)


@contextmanager
def patience_for(num_bytes: int) -> Iterator[None]:
    """Have mlflow wait longer for an answer: a server answers only once it has passed a large artifact on."""
    before = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(int(float(before) + num_bytes / BYTES_PER_SECOND))
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def check_server(uri: str | None, experiment: str) -> None:
    """Ask a server whether it will take a run; other stores are not asked. Takes ten seconds at most, and the import.

    Raises:
        InputError: it refuses the user, or the experiment cannot be written to, or it is no MLflow server.
        ServerUnreachable: it does not answer, or says that it cannot answer now.
    """
    uri = configured(uri)
    if uri is None or not is_server(uri):
        return
    prepare()
    import mlflow  # noqa: F401 - its seconds are not the server's

    if not answers_within(CHECK_SECONDS, lambda: _ask(uri, experiment)):
        raise ServerUnreachable(f"MLflow at {uri} did not answer within {CHECK_SECONDS:g} s")


def _ask(uri: str, experiment: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    try:
        known = client.get_experiment_by_name(experiment)
        if known is not None and known.lifecycle_stage != "active":
            problem = "was deleted there; restore it, or set tracking.experiment to another name"
            raise InputError(f"MLflow at {uri}: the experiment {experiment!r} {problem}")
        if known is not None:
            client.set_experiment_tag(known.experiment_id, TOO_LONG, "")
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise refusal(uri, experiment, error) from error


def refusal(uri: str, experiment: str, error: "MlflowException") -> InputError | ServerUnreachable:
    """What a server's answer means to a user."""
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    if status == 401:
        named = os.environ.get(USERNAME) and os.environ.get(PASSWORD)
        problem = "refuses this user and password" if named else "asks for a user and a password"
        return InputError(f"MLflow at {uri} {problem}; set {CREDENTIALS}")
    if status == 403:
        return InputError(
            f"MLflow at {uri} does not let this user write to the experiment {experiment!r}; set {CREDENTIALS}, or "
            f"set tracking.experiment to another name. It says: {described(error)}"
        )
    if status >= 500 or status in OVERLOADED:
        return ServerUnreachable(f"MLflow at {uri} cannot be reached now: {described(error)}")
    return InputError(f"tracking.uri: {uri} does not answer as an MLflow server does: {described(error)}")
