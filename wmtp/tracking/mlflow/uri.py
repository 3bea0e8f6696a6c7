"""Where the store is: an address that may be written down, since it names no user and no password."""

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
OF_A_SERVER = re.compile(r"(?!sqlite:|file:)[\w+.-]+://", re.IGNORECASE)


def _without_user(uri: str) -> str:
    if names_user(uri):
        raise ValueError(f"names a user or a password; they belong into {CREDENTIALS}")
    return uri


Address = Annotated[str, AfterValidator(_without_user)]
"""An address of a store for a config, which is written to many places: with a user or a password it is a fault."""


def names_user(uri: str) -> bool:
    """Whether an address holds a user or a password, also where a password's `/` makes it look like a path."""
    return OF_A_SERVER.match(uri) is not None and "@" in uri


def is_server(uri: str) -> bool:
    """Whether a store is reached over HTTP."""
    return uri.lower().startswith(("http://", "https://"))


def is_out_of_reach(uri: str) -> bool:
    """Whether a store is a database on another machine's disk."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).parent.is_dir()


def take_credentials() -> None:
    """Move the user and the password in MLFLOW_TRACKING_URI, if it has them, to variables of their own.

    Raises:
        InputError: where they stand in it they cannot be told apart, or its kind of store does not take them apart.
    """
    uri = os.environ.get(URI, "")
    if not names_user(uri):
        return
    parts = urlsplit(uri)
    user_info, _, host = parts.netloc.rpartition("@")
    if not is_server(uri) or not user_info or "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise InputError(f"{URI} names a user or a password in a form that is not understood; set {CREDENTIALS}")
    user, _, password = user_info.partition(":")
    os.environ.update({USERNAME: unquote(user), PASSWORD: unquote(password), URI: parts._replace(netloc=host).geturl()})


def configured(uri: str | None) -> str | None:
    """The address that the config names or else the environment; None if neither does.

    Raises:
        InputError: it holds a user or a password.
    """
    take_credentials()
    uri = uri or os.environ.get(URI) or None
    if uri is not None and names_user(uri):
        raise InputError(f"tracking.uri names a user or a password; they belong into {CREDENTIALS}")
    return uri.rstrip("/") if uri is not None and is_server(uri) else uri


def absolute_uri(uri: str | None, folder: Path) -> str:
    """Where the store of a run is, whatever the current directory becomes; by default `mlflow.db` in `outputs`.

    Raises:
        InputError: the address holds a user or a password.
    """
    uri = configured(uri)
    if uri is None:
        outputs = next((parent for parent in folder.parents if parent.name == "outputs"), folder.parent)
        return f"{SQLITE}{outputs / 'mlflow.db'}"
    return f"{SQLITE}{os.path.abspath(uri.removeprefix(SQLITE))}" if uri.startswith(SQLITE) else uri
