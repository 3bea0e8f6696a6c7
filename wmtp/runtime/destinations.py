"""The servers to which this user has sent data before, so that a copied run cannot choose a new one."""

import os
from collections.abc import Iterable
from pathlib import Path

ENVIRONMENT = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Environment variables that contain destinations. The environment is trusted."""
SQLITE = "sqlite:///"


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
    known = {normalize(os.environ[name]) for name in ENVIRONMENT if os.environ.get(name)}
    try:
        return known | set(_file().read_text().splitlines())
    except (OSError, RuntimeError, UnicodeError):
        return known


def remember_destinations(destinations: Iterable[str]) -> None:
    """Add destinations to the file of known destinations. If the user has no such file, do nothing."""
    new = {normalize(each) for each in destinations} - known_destinations()
    if not new:
        return
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("".join(f"{each}\n" for each in sorted(new)))
    except (OSError, RuntimeError):
        pass  # without a home folder, the user confirms a destination each time


def _file() -> Path:
    """Return the path of the file of known destinations.

    Raises:
        RuntimeError: this user has no home folder.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wmtp" / "destinations"
