"""Check and resolve the tracking URI of MLflow. It must not contain credentials, because it is logged and saved."""

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from wmtp.errors import InputError

SQLITE = "sqlite:///"
URI, USERNAME, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
CREDENTIALS = f"{USERNAME} and {PASSWORD}, in the environment or in .env"
HAS_HOST = re.compile(r"(?!sqlite:|file:)[\w+.-]+://", re.IGNORECASE)


def _reject_credentials(uri: str) -> str:
    if has_credentials(uri):
        raise ValueError(f"holds a user or a password; set {CREDENTIALS}, instead")
    return uri


TrackingUri = Annotated[str, AfterValidator(_reject_credentials)]
"""Type of a config value that is a tracking URI. A URI that contains a user or a password is rejected, because configs
are saved and uploaded."""


def has_credentials(uri: str) -> bool:
    """Return whether a URI contains a user or a password. A password that contains `/` is also recognized."""
    return HAS_HOST.match(uri) is not None and "@" in uri


def is_server(uri: str) -> bool:
    """Return whether a tracking URI is the HTTP or HTTPS URL of a server."""
    return uri.lower().startswith(("http://", "https://"))


def is_on_other_machine(uri: str) -> bool:
    """Return whether a tracking URI names an SQLite file in a folder that does not exist on this machine."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).parent.is_dir()


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
        InputError: the URI contains a user or a password.
    """
    move_credentials()
    uri = uri or os.environ.get(URI) or None
    if uri is not None and has_credentials(uri):
        raise InputError(f"tracking.uri holds a user or a password; set {CREDENTIALS}, instead")
    return uri.rstrip("/") if uri is not None and is_server(uri) else uri


def absolute_uri(uri: str | None, folder: Path) -> str:
    """Return the tracking URI of the run in `folder`. If the URI names an SQLite file, its path is absolute.

    If neither `uri` nor MLFLOW_TRACKING_URI is set, the URI names the SQLite file `mlflow.db` in the `outputs` folder
    that contains the run.

    Raises:
        InputError: the URI contains a user or a password.
    """
    uri = resolve_uri(uri)
    if uri is None:
        outputs = next((parent for parent in folder.parents if parent.name == "outputs"), folder.parent)
        return f"{SQLITE}{outputs / 'mlflow.db'}"
    return f"{SQLITE}{os.path.abspath(uri.removeprefix(SQLITE))}" if uri.startswith(SQLITE) else uri
