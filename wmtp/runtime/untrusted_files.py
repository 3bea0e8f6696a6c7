"""Reading of the files of a run or of a model, which a stranger may have written."""

import os
from pathlib import Path
from typing import Any

import yaml

from wmtp.errors import InputError

MAX_DEPTH = 50
STARTS = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken,
          yaml.BlockMappingStartToken)  # fmt: skip
ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def require_inside(folder: Path) -> None:
    """Check that nothing in the folder of a run or of a sweep is a link to a place outside this folder.

    Otherwise, its owner could choose which other files are read, copied, uploaded or overwritten.

    Raises:
        InputError: there is such a link, or an entry that is neither a file nor a folder.
    """
    root = Path(os.path.realpath(folder))
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise InputError(f"{path}: is a link out of the run's folder; replace it with a copy if you trust it")
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise InputError(f"{path}: is neither a file nor a folder; remove it")


def read_own_file(path: Path) -> bytes:
    """Return the content of a file that is copied from the folder of a model or tokenizer to a run or an export.

    In Hugging Face's cache, such files are links into the folder `blobs` of the same repository.

    Raises:
        InputError: the file is a link to another place, and could therefore contain a secret.
    """
    folder, real = path.parent.resolve(), Path(os.path.realpath(path))
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), folder)
    if not any(real.is_relative_to(place) for place in (folder, repository / "blobs")):
        raise InputError(f"{path}: is a link to {real}, out of its folder; replace it with a copy if you trust it")
    return real.read_bytes()


def parse_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain values.

    Raises:
        ValueError: the file is not YAML, or `read_yaml` refuses it.
    """
    try:
        return yaml.safe_load(read_yaml(path))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_yaml(path: Path) -> str:
    """Return the content of a YAML file.

    Aliases and deep nesting are refused, because with them a small file can fill the memory or take minutes to parse.

    Raises:
        ValueError, yaml.YAMLError: the file is not YAML, it contains an alias, or it is nested too deeply.
    """
    text, depth = path.read_text(), 0
    for token in yaml.scan(text, yaml.SafeLoader):
        depth += isinstance(token, STARTS) - isinstance(token, ENDS)
        if isinstance(token, yaml.AliasToken) or depth > MAX_DEPTH:
            raise ValueError("it contains a YAML alias, or is nested too deeply")
    return text
