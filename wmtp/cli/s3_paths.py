"""Download the runs at S3 URLs in the command line, and replace each URL with the folder of the local copy."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from wmtp.config.overrides import chosen_run_dir, quote
from wmtp.config.schema import ConfigError, ConfigIssue, format_problem, validate_value
from wmtp.runtime.run_dir import OUTPUTS
from wmtp.s3.client import S3Options
from wmtp.s3.fetch import CheckpointChoice, fetch_run, find_run, local_folder

COPIES = OUTPUTS / "copies"
"""Folder of models that were downloaded for evaluation, generation or export."""
STORE_PREFIX = "checkpoint."
"""Prefix of the keys that configure the S3 store."""


def replace_remote_args(arguments: list[str], keys: Mapping[str, CheckpointChoice], scratch: Path | None) -> list[str]:
    """Download the runs at S3 URLs, and return the arguments with local folders instead of the URLs.

    A run that will be resumed ("latest") is copied to the path below outputs/ that it had on its first machine, or to
    `hydra.run.dir`, which is then removed from the arguments. A model that will be used ("best") is copied to a folder
    below outputs/copies, because no training may be resumed in it.

    Args:
        arguments: arguments of the command.
        keys: keys whose value may be an S3 URL, and the checkpoints that are downloaded for each.
        scratch: folder for all copies, instead of the folders above.

    Raises:
        ConfigError: the options of the store are not valid.
        InputError: the store refuses access, or does not contain the run.
        OSError: the store does not respond.
    """
    options, run_dir = store_options(arguments), chosen_run_dir(arguments)
    console = Console(markup=False, stderr=True)
    result: list[str] = []
    used_run_dir = False
    for argument in arguments:
        key, _, url = (part.strip("'\"") for part in argument.lstrip("+").partition("="))
        if key not in keys or not url.startswith("s3://"):
            result.append(argument)
            continue
        resumes, run = keys[key] == "latest", find_run(url, options)
        url = url if url.startswith(f"{run}/") else run  # a checkpoint of the run, or the run itself
        default = (run_dir or local_folder(url)) if resumes else COPIES / local_folder(url).relative_to(OUTPUTS)
        folder = fetch_run(url, scratch or default, options, checkpoints=keys[key], console=console)
        result.append(f"{key}={quote(folder)}")
        used_run_dir = used_run_dir or resumes
    return [argument for argument in result if not (used_run_dir and argument.startswith("hydra.run.dir="))]


def store_options(arguments: list[str]) -> S3Options:
    """Return the S3 options in the arguments; the environment provides those that are missing.

    Raises:
        ConfigError: an option is not valid.
    """
    values = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        name = key.removeprefix(STORE_PREFIX)
        if equals and key.startswith(STORE_PREFIX) and name in S3Options.__annotations__ and value != "null":
            values[name] = value.strip("'\"")
    try:
        options: S3Options = validate_value(S3Options, values)
    except ValidationError as error:
        raise ConfigError([ConfigIssue("checkpoint", str(values), format_problem(error))]) from error
    return options
