"""Environment variables and `.env` files.

They contain settings of a machine or a user, such as credentials. These settings are not part of a config.
"""

import os
from pathlib import Path

from dotenv import load_dotenv

from wmtp.config.schema import CONFIG_FOLDER, CREDENTIALS, ConfigError, ConfigIssue


def load_environment() -> None:
    """Load environment variables from the files `.env` in the working directory and in the folder that contains conf/.

    Variables that already exist are not changed.

    Raises:
        InputError: the user name or the password in the variable MLFLOW_TRACKING_URI cannot be parsed.
    """
    for folder in (Path.cwd(), CONFIG_FOLDER.parent):
        load_dotenv(folder / ".env", override=False)
    if "@" in os.environ.get("MLFLOW_TRACKING_URI", ""):
        from wmtp.tracking.mlflow import move_credentials

        move_credentials()


def refuse_credentials(arguments: list[str]) -> None:
    """Refuse arguments that contain a URL with a user name or a password, because the arguments of a run are stored.

    Raises:
        ConfigError: an argument contains a URL with a user name or a password.
    """
    problem = "contains a user name in a URL; put users and passwords into the environment or .env (see .env.example)"
    issues = [ConfigIssue(arg.partition("=")[0], "", problem) for arg in arguments if CREDENTIALS.search(arg)]
    if issues:
        raise ConfigError(issues)
