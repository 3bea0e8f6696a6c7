"""Settings that belong to a machine or a person, not to a run: the environment's variables, and those of `.env`."""

from pathlib import Path

from dotenv import load_dotenv

from wmtp.config import CONFIG_FOLDER, CREDENTIALS, ConfigError, Fault


def load_environment() -> None:
    """Take what `.env` says, here and beside the source, where the environment does not say it itself."""
    for folder in (Path.cwd(), CONFIG_FOLDER.parent):
        load_dotenv(folder / ".env", override=False)


def refuse_credentials(arguments: list[str]) -> None:
    """Raises `ConfigError` where an argument has a user or a password in an address: arguments are written down."""
    problem = "names a user in an address; users and passwords belong into the environment or .env (see .env.example)"
    faults = [Fault(argument.partition("=")[0], "", problem) for argument in arguments if CREDENTIALS.search(argument)]
    if faults:
        raise ConfigError(faults)
