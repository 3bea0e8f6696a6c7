"""S3 addresses on the command line: a local copy is brought, and its folder takes the address's place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from rich.console import Console

from wmtp.config.overrides import named_folder, quoted
from wmtp.config.schema import ConfigError, Fault, problem_of, validated
from wmtp.runtime.run_dir import OUTPUTS
from wmtp.s3.client import S3Options
from wmtp.s3.fetch import fetch_run, find_run, local_folder

Which = Literal["latest", "best"]
COPIES = OUTPUTS / "copies"
"""Where models of S3 are kept that are used here."""
STORE = "checkpoint."
"""Keys of the group that says how the store is reached begin with it."""


def fetched(arguments: list[str], keys: Mapping[str, Which], scratch: Path | None) -> list[str]:
    """The arguments with the folders of local copies in the place of S3 addresses.

    A run that is to be gone on with lies under outputs/ as it did where it was made, or where `hydra.run.dir` says,
    which is then used up. A model that is to be used lies in a folder of its own, which no training goes on in; both
    lie in `scratch`, if that is given.

    Raises:
        ConfigError: something is wrong with how the store is to be reached.
        InputError: the store refuses it, or there is no run.
        OSError: the store does not answer.
    """
    options, named = store_options(arguments), named_folder(arguments)
    console = Console(markup=False, stderr=True)
    result: list[str] = []
    used = False
    for argument in arguments:
        key, _, url = (part.strip("'\"") for part in argument.lstrip("+").partition("="))
        if key not in keys or not url.startswith("s3://"):
            result.append(argument)
            continue
        goes_on, run = keys[key] == "latest", find_run(url, options)
        url = url if url.startswith(f"{run}/") else run  # one of its checkpoints, or it was the only run below
        own = (named or local_folder(url)) if goes_on else COPIES / local_folder(url).relative_to(OUTPUTS)
        target = scratch or own
        folder = fetch_run(url, target, options, checkpoints=keys[key], console=console)
        result.append(f"{key}={quoted(folder)}")
        used = used or goes_on
    return [argument for argument in result if not (used and argument.startswith("hydra.run.dir="))]


def store_options(arguments: list[str]) -> S3Options:
    """How the store is reached, as far as the arguments say it; the environment says the rest.

    Raises:
        ConfigError: they say it wrongly.
    """
    typed = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        name = key.removeprefix(STORE)
        if equals and key.startswith(STORE) and name in S3Options.__annotations__ and value != "null":
            typed[name] = value.strip("'\"")
    try:
        options: S3Options = validated(S3Options, typed)
    except ValidationError as error:
        raise ConfigError([Fault("checkpoint", str(typed), problem_of(error))]) from error
    return options
