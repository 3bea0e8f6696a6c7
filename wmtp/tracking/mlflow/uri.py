"""Check and resolve the tracking URI of MLflow. It must not contain credentials, because it is logged and saved."""

import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from wmtp.errors import InputError
from wmtp.runtime.destinations import known_destinations, normalize
from wmtp.runtime.writable import write_problem

SQLITE = "sqlite:///"
SQLITE_HEADER = b"SQLite format 3\0"
"""The first bytes of an SQLite file."""
URI, USERNAME, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
CREDENTIALS = f"{USERNAME} and {PASSWORD}, in the environment or in .env"
EXPERIMENT, DEFAULT_EXPERIMENT = "MLFLOW_EXPERIMENT_NAME", "wmtp"
STORES = {"postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc"}
"""Schemes of tracking URIs that MLflow accepts in addition to servers and SQLite files. A driver may follow, as in
`mysql+pymysql`."""
STORE_PLUGINS = "mlflow.tracking_store"
"""Group of the entry points with which a package adds a scheme of tracking URIs to MLflow."""
HOST = re.compile(r"(localhost|[\w-]+(\.[\w-]+)+|[\w.-]+(?=:\d))(:\d+)?(/\S*)?")
"""Pattern of a server's address without a scheme, such as `localhost:5000`."""
MISTYPED_SERVER = re.compile(r"(https?)//(?=\w)", re.IGNORECASE)
HAS_HOST = re.compile(r"(?!sqlite:|file:)[\w+.-]+://", re.IGNORECASE)


def _validate(uri: str) -> str:
    if problem := uri_problem(uri):
        raise ValueError(problem)
    return uri


TrackingUri = Annotated[str, AfterValidator(_validate)]
"""Type of a config value that is a tracking URI. A URI at which MLflow cannot store runs is rejected. So is a URI that
contains a user or a password, because configs are saved and uploaded."""


def uri_problem(uri: str) -> str | None:
    """Return the reason why runs cannot be tracked at a URI, with the right form of the URI, or None if they can."""
    if has_credentials(uri):
        return f"holds a user or a password; set {CREDENTIALS}, instead"
    if uri != uri.strip():
        return f"has blanks around it; write {uri.strip()}" if uri.strip() else "is empty"
    scheme, _, rest = uri.partition(":")
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        return _server_problem(uri)
    if scheme == "sqlite":
        return _sqlite_problem(rest)
    if scheme.partition("+")[0] in STORES or scheme in {plugin.name for plugin in entry_points(group=STORE_PLUGINS)}:
        return None
    if server := MISTYPED_SERVER.match(uri):
        return f"has a mistyped scheme; write {server[1].lower()}://{uri[server.end() :]}"
    if HOST.fullmatch(uri):
        return f"lacks its scheme; write http://{uri}"
    if scheme == "file" or "://" not in uri:
        folder = uri.removeprefix("file:").removeprefix("//").rstrip("/") or "."
        if folder.endswith((".db", ".sqlite", ".sqlite3")):
            return f"lacks its scheme; write {SQLITE}{folder}"
        return f"names a folder, in which MLflow stores no runs; write {SQLITE}{folder}/mlflow.db"
    return f"has a scheme that MLflow does not know; write http://HOST:PORT, https://HOST or {SQLITE}PATH"


def _sqlite_problem(rest: str) -> str | None:
    """Return the reason why a URI that begins with `sqlite:` names no file, or None if it names one."""
    path = rest.removeprefix("///").partition("?")[0]
    is_folder = not path or Path(path).is_dir()
    if rest.startswith("///") and not is_folder:
        return None
    file = Path(path or ".") / "mlflow.db" if is_folder else rest.lstrip("/")
    return f"names no SQLite file; write {SQLITE}{file}"


def check_database(uri: str | None, folder: Path) -> None:
    """Check that the run in `folder` can be stored at a tracking URI if the URI names an SQLite file.

    Raises:
        InputError: the run cannot be stored in the file.
    """
    uri = absolute_uri(uri, folder)
    if uri.startswith(SQLITE) and (problem := _database_problem(uri)):
        raise InputError(f"{uri}: {problem}; choose another file with tracking.uri={SQLITE}PATH")


def _database_problem(uri: str) -> str | None:
    """Return the reason why runs cannot be stored in the SQLite file that a URI names, or None if they can."""
    file = Path(uri.removeprefix(SQLITE).partition("?")[0])
    if problem := write_problem(file.parent):
        return problem
    if not file.exists():
        return None
    if not file.is_file():
        return "is not a file"
    try:
        with file.open("r+b") as opened:
            is_database = opened.read(len(SQLITE_HEADER)) in (b"", SQLITE_HEADER)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None if is_database else "is not an SQLite database"


def _server_problem(uri: str) -> str | None:
    """Return the reason why a URL of a server is not valid, or None if it is valid."""
    try:
        parts = urlsplit(uri)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    return None if valid and not re.search(r"\s", uri) else "has no valid host and port; write http://HOST:PORT"


def has_credentials(uri: str) -> bool:
    """Return whether a URI contains a user or a password. A password that contains `/` is also recognized."""
    return HAS_HOST.match(uri) is not None and "@" in uri


def is_server(uri: str) -> bool:
    """Return whether a tracking URI is the HTTP or HTTPS URL of a server."""
    return uri.lower().startswith(("http://", "https://"))


def is_on_other_machine(uri: str) -> bool:
    """Return whether a tracking URI names an SQLite file in a folder that does not exist on this machine."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).parent.is_dir()


def is_confirmed(uri: str, folder: Path) -> bool:
    """Return whether the user has chosen a URI that the mlflow.json in `folder` contains, and not only this file.

    The user has sent runs there before, or it is the URI that a run in this folder has by default.
    """
    return normalize(uri) in known_destinations() or uri == absolute_uri(None, folder.absolute())


def move_credentials() -> None:
    """Move the user and the password from MLFLOW_TRACKING_URI to two other environment variables.

    These are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. If MLFLOW_TRACKING_URI contains no user and no
    password, nothing is changed.

    Raises:
        InputError: the user and the password cannot be parsed, or the URI is not an HTTP URL. For other URIs, MLflow
            would ignore the two variables.
    """
    uri = os.environ.get(URI, "")
    if not has_credentials(uri):
        return
    parts = urlsplit(uri)
    user_info, _, host = parts.netloc.rpartition("@")
    if not is_server(uri) or not user_info or "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise InputError(
            f"{URI} holds a user or a password in a form that is not supported; set {CREDENTIALS}, instead"
        )
    user, _, password = user_info.partition(":")
    os.environ.update({USERNAME: unquote(user), PASSWORD: unquote(password), URI: parts._replace(netloc=host).geturl()})


def resolve_uri(uri: str | None) -> str | None:
    """Return the tracking URI that is used: `uri` from the config or, if it is not set, MLFLOW_TRACKING_URI.

    Return None if neither is set.

    Raises:
        InputError: MLflow cannot store runs at this URI, or the URI contains a user or a password.
    """
    move_credentials()
    name = "tracking.uri" if uri else URI
    uri = uri or os.environ.get(URI) or None
    if uri is not None and (problem := uri_problem(uri)):
        raise InputError(f"{name}: {problem}" if has_credentials(uri) else f"{name}={uri!r}: {problem}")
    return uri.rstrip("/") if uri is not None and is_server(uri) else uri


def resolve_experiment(name: str | None) -> str:
    """Return the name of the experiment: `name`, or else MLFLOW_EXPERIMENT_NAME, or else `DEFAULT_EXPERIMENT`."""
    return name or os.environ.get(EXPERIMENT) or DEFAULT_EXPERIMENT


def absolute_uri(uri: str | None, folder: Path) -> str:
    """Return the tracking URI of the run in `folder`. If the URI names an SQLite file, its path is absolute.

    If neither `uri` nor MLFLOW_TRACKING_URI is set, the URI names the SQLite file `mlflow.db` in the `outputs` folder
    that contains the run.

    Raises:
        InputError: MLflow cannot store runs at this URI, or the URI contains a user or a password.
    """
    uri = resolve_uri(uri)
    if uri is None:
        outputs = next((parent for parent in folder.parents if parent.name == "outputs"), folder.parent)
        return f"{SQLITE}{outputs / 'mlflow.db'}"
    return f"{SQLITE}{os.path.abspath(uri.removeprefix(SQLITE))}" if uri.startswith(SQLITE) else uri
