"""Settings that belong to a machine or a person, not to a run: the environment's variables, and those of `.env`."""

import os
from pathlib import Path

from dotenv import load_dotenv

from wmtp.config.schema import CONFIG_FOLDER, CREDENTIALS, ConfigError, Fault


def load_environment() -> None:
    """Take what `.env` says, here and beside the source, where the environment does not say it itself.

    Raises:
        InputError: a user and password in MLFLOW_TRACKING_URI are not understood.
    """
    for folder in (Path.cwd(), CONFIG_FOLDER.parent):
        load_dotenv(folder / ".env", override=False)
    if "@" in os.environ.get("MLFLOW_TRACKING_URI", ""):
        from wmtp.tracking.mlflow import take_credentials

        take_credentials()


def refuse_credentials(arguments: list[str]) -> None:
    """Raises `ConfigError` where an argument has a user or a password in an address: arguments are written down."""
    problem = "names a user in an address; users and passwords belong into the environment or .env (see .env.example)"
    faults = [Fault(argument.partition("=")[0], "", problem) for argument in arguments if CREDENTIALS.search(argument)]
    if faults:
        raise ConfigError(faults)
