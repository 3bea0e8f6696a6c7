"""The servers to which this user has sent data before, so that a copied run cannot choose a new one."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from wmtp.errors import InputError

ENVIRONMENT = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Environment variables that contain destinations. The environment is trusted."""
SQLITE = "sqlite:///"
_used_by_this_process: set[str] = set()


def normalize(destination: str) -> str:
    """Return the form in which destinations are compared. Of an S3 URL, it contains only the bucket.

    The path of an SQLite file becomes absolute.

    >>> normalize("s3://bucket/runs"), normalize("http://host:5000/")
    ('s3://bucket', 'http://host:5000')
    """
    if destination.startswith(SQLITE):
        return SQLITE + os.path.abspath(destination.removeprefix(SQLITE))
    parts = destination.rstrip("/").split("/")
    return "/".join(parts[:3]) if destination.startswith("s3://") else "/".join(parts)


def known_destinations() -> set[str]:
    """Return the destinations in the environment, and those that were passed to `remember_destinations`."""
    return _used_by_this_process | _environment() | _recorded()


def remember_destinations(destinations: Iterable[str]) -> None:
    """Record destinations and those in the environment. Without a home folder, only this process knows them."""
    new = {normalize(each) for each in destinations} | _environment()
    new -= _recorded()
    if not new:
        return
    _used_by_this_process.update(new)
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("".join(f"{each}\n" for each in sorted(new)))
    except (OSError, RuntimeError):
        pass  # without a home folder, the user confirms a destination with each command


def require_known(folder: Path, key: str, destination: str | None) -> None:
    """Check that this user has sent data to a destination before. None stands for the destination in the environment.

    `folder` is the folder of a run or sweep, whose files set the key to this destination.

    Raises:
        InputError: the destination is not known.
    """
    if destination is not None and normalize(destination) not in known_destinations():
        variable = "MLFLOW_TRACKING_URI" if key == "tracking.uri" else "AWS_ENDPOINT_URL_S3"
        raise InputError(
            f"{folder}: its {key}={destination} is a server that you have not used before; if you trust it with your "
            f"credentials, set {variable}={destination}"
        )


def _environment() -> set[str]:
    """Return the destinations in the environment, without user names and passwords."""
    values = [os.environ.get(name) for name in ENVIRONMENT]
    return {normalize(re.sub(r"://\S*@", "://", value)) for value in values if value}


def _recorded() -> set[str]:
    try:
        return set(_file().read_text().splitlines())
    except (OSError, RuntimeError, UnicodeError):
        return set()


def _file() -> Path:
    """Return the path of the file of known destinations.

    Raises:
        RuntimeError: this user has no home folder.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wmtp" / "destinations"
