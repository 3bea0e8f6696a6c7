"""Download of runs from the S3 URLs on a command line. Local paths replace the URLs."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from wmtp.config.moved_targets import current_key
from wmtp.config.overrides import RUN_DIR, chosen_run_dir, override_key, override_text, quote
from wmtp.config.schema import ConfigError, ConfigIssue
from wmtp.config.values import format_problem, validate_value
from wmtp.runtime.console import Console
from wmtp.runtime.destinations import remember_destinations
from wmtp.runtime.run_dir import OUTPUTS
from wmtp.s3.fetch import CheckpointChoice, fetch_run, find_run, local_folder
from wmtp.s3.options import S3Options

COPIES = OUTPUTS / "copies"
"""Folder for models that are downloaded for evaluation, generation or export."""
STORE_PREFIX = "checkpoint.s3."
"""Prefix of the config keys with options of the S3 store."""


def replace_remote_args(arguments: list[str], keys: Mapping[str, CheckpointChoice], scratch: Path | None) -> list[str]:
    """Download the runs whose S3 URLs are in the arguments, and replace the URLs with the paths of local folders.

    If a run will be resumed, it is copied to `hydra.run.dir`, and this argument is removed. Without `hydra.run.dir`,
    the run is copied to the same path in outputs/ that it had on the machine that started it. If only the model of a
    run will be used, the run is copied to a folder in outputs/copies, because no training may be resumed there.

    Args:
        arguments: arguments of the command.
        keys: config keys whose value may be an S3 URL. The choice for a key is "latest" if the run will be resumed, and
            "best" if only its model will be used.
        scratch: folder for all copies. If it is None, the copies are in the folders that are described above.

    Raises:
        ConfigError: the options of the S3 store are not valid.
        InputError: the S3 store refuses access, or it does not contain the run.
        OSError: the S3 store does not respond.
    """
    options, run_dir = store_options(arguments), chosen_run_dir(arguments)
    console = Console(stderr=True)
    result: list[str] = []
    used_run_dir = False
    for argument in arguments:
        key, url = override_key(argument), override_text(argument)
        if key not in keys or not url.startswith("s3://"):
            result.append(argument)
            continue
        resumes, run = keys[key] == "latest", find_run(url, options)
        url = url if url.startswith(f"{run}/") else run  # a checkpoint of the run, or the run itself
        default = (run_dir or local_folder(url)) if resumes else COPIES / local_folder(url).relative_to(OUTPUTS)
        if resumes:
            remember_destinations([run])  # a resumed run uses the bucket that the user has typed
        folder = fetch_run(url, scratch or default, options, checkpoints=keys[key], console=console)
        result.append(f"{key}={quote(folder)}")
        used_run_dir = used_run_dir or resumes
    return [argument for argument in result if not (used_run_dir and argument.startswith(f"{RUN_DIR}="))]


def store_options(arguments: list[str]) -> S3Options:
    """Return the S3 options that the arguments set. All other options have their default values.

    Raises:
        ConfigError: an option is not valid, or its key has the name that it had in an earlier version.
    """
    values = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if (current := current_key(key)) != key:
            raise ConfigError([ConfigIssue(key, value, f"unknown key; did you mean {current}?")])
        name = key.removeprefix(STORE_PREFIX)
        if equals and key.startswith(STORE_PREFIX) and name in S3Options.__annotations__ and value != "null":
            values[name] = override_text(argument)
    try:
        options: S3Options = validate_value(S3Options, values)
    except ValidationError as error:
        raise ConfigError([ConfigIssue("checkpoint.s3", str(values), format_problem(error))]) from error
    return options
