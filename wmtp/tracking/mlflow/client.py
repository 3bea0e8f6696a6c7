"""Connect to an MLflow server or to an SQLite file on this machine, and check whether a server accepts runs."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.errors import InputError
from wmtp.runtime.background import format_error
from wmtp.runtime.locks import file_lock
from wmtp.runtime.processes import run_with_timeout
from wmtp.tracking.mlflow.uri import (
    CREDENTIALS,
    PASSWORD,
    SQLITE,
    USERNAME,
    is_server,
    resolve_experiment,
    resolve_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
ENVIRONMENT = {
    # With mlflow's defaults, a call to a dead server blocks for four minutes, and mlflow creates a run twice if the
    # first response is late. BackgroundSender repeats failed calls instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    TIMEOUT: "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Default values for environment variables of mlflow. A variable that the user has set is not changed."""
NUMBERS = {TIMEOUT: int, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": int, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": int,
           "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": float}  # fmt: skip
"""Environment variables that mlflow reads as numbers at every request, with their types."""
NO_HOME = "/nonexistent"
"""Home directory that is set if the user has none. mlflow reads the path when it is imported, but needs no file there.
"""
CHECK_SECONDS = 9.0
"""Time limit in seconds of the check in `check_server`. It does not include the time to import mlflow."""
BYTES_PER_SECOND = 1e6
"""Assumed upload speed of artifacts in bytes per second. Time limits for uploads are computed from it."""
INVALID_TAG_NAME = "x" * 251
"""A tag name that is too long for MLflow. `check_server` uses it to check, without setting a tag, whether the user may
set tags: the error of the server is different if the user has no permission."""
OVERLOADED = (408, 429)
"""HTTP status codes with which a server reports that it is temporarily overloaded."""


class ServerUnreachable(OSError):
    """The MLflow server does not respond, or is temporarily unavailable."""


def configure_mlflow() -> None:
    """Set environment variables that configure mlflow. This function must be called before mlflow is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        Path.home()
    except RuntimeError:  # in a container, HOME may be unset and the user unknown
        os.environ["HOME"] = NO_HOME
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # urllib3 would log each of its retries


def connect(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """Connect to an MLflow store. Return the client and the id of the experiment.

    If the experiment does not exist, it is created. If `uri` is an SQLite file that does not exist, it is also created.
    """
    configure_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    # Processes that create the store at the same time damage it.
    with file_lock(Path(f"{database}.lock")) if database else nullcontext():
        if database and not database.exists():
            create_store(database)
        client = MlflowClient(tracking_uri=uri)
        if found := client.get_experiment_by_name(experiment):
            return client, found.experiment_id
        artifacts = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return client, client.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        existing = client.get_experiment_by_name(experiment)
        assert existing is not None
        return client, existing.experiment_id


def create_store(database: Path) -> None:
    """Create an SQLite file for MLflow.

    The file is created in a temporary folder and then moved to `database`, because a partly created file is unusable.
    """
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".mlflow-") as staging:
        staged = Path(staging) / database.name
        MlflowClient(tracking_uri=f"{SQLITE}{staged}").search_experiments(max_results=1)
        os.replace(staged, database)


@contextmanager
def longer_timeout(num_bytes: int) -> Iterator[None]:
    """Extend mlflow's request timeout while the context is active, so that an artifact of `num_bytes` can be uploaded.

    A longer timeout is necessary because the server responds only after it has stored the complete artifact.
    """
    before = os.environ[TIMEOUT]
    os.environ[TIMEOUT] = str(int(float(before) + num_bytes / BYTES_PER_SECOND))
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before


def check_variables() -> None:
    """Check the environment variables that mlflow reads as numbers.

    Raises:
        InputError: the value of a variable is not a number of the right type.
    """
    for name, kind in NUMBERS.items():
        try:
            kind(os.environ.get(name, "0"))
        except ValueError as error:
            number = "an integer" if kind is int else "a number"
            raise InputError(f"{name}={os.environ[name]!r}: must be {number}; correct or unset it") from error


def check_server(uri: str | None, experiment: str | None) -> None:
    """Check the URI, and that an MLflow server accepts runs in an experiment. Another store than a server is not used.

    The check takes at most ten seconds, plus the time to import mlflow.

    Raises:
        InputError: MLflow cannot store runs at the URI, an environment variable of mlflow is not valid, the server
            rejects the user, the user may not write to the experiment, the experiment was deleted, or the server is
            not an MLflow server.
        ServerUnreachable: the server does not respond, or is temporarily unavailable.
    """
    uri, name = resolve_uri(uri), resolve_experiment(experiment)
    check_variables()
    if uri is None or not is_server(uri):
        return
    configure_mlflow()
    import mlflow  # noqa: F401 - the time limit does not include the import

    if not run_with_timeout(CHECK_SECONDS, lambda: _check_experiment(uri, name)):
        raise ServerUnreachable(f"MLflow at {uri} did not answer within {CHECK_SECONDS:g} s")


def _check_experiment(uri: str, experiment: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    try:
        known = client.get_experiment_by_name(experiment)
        if known is not None and known.lifecycle_stage != "active":
            problem = "was deleted there; restore it, or set tracking.experiment to another name"
            raise InputError(f"MLflow at {uri}: the experiment {experiment!r} {problem}")
        if known is not None:
            client.set_experiment_tag(known.experiment_id, INVALID_TAG_NAME, "")
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise to_error(uri, experiment, error) from error


def to_error(uri: str, experiment: str, error: "MlflowException") -> InputError | ServerUnreachable:
    """Convert an error response of an MLflow server to an exception with a message for the user.

    Args:
        uri: URL of the server.
        experiment: name of the experiment.
        error: exception that mlflow raised for the response.
    """
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    if status == 401:
        are_set = os.environ.get(USERNAME) and os.environ.get(PASSWORD)
        problem = "rejects this user and password" if are_set else "requires a user and a password"
        return InputError(f"MLflow at {uri} {problem}; set {CREDENTIALS}")
    if status == 403:
        return InputError(
            f"MLflow at {uri} does not let this user write to the experiment {experiment!r}; set {CREDENTIALS}, or "
            f"set tracking.experiment to another name. Error: {format_error(error)}"
        )
    if status >= 500 or status in OVERLOADED:
        return ServerUnreachable(f"MLflow at {uri} cannot be reached now: {format_error(error)}")
    return InputError(f"tracking.uri: {uri} does not answer as an MLflow server does: {format_error(error)}")
