"""Reading of the files of a run, which a stranger may have written."""

import os
from pathlib import Path

import yaml

from wmtp.errors import InputError

RUN_FILES = ("*.json", "*.jsonl", "*.yaml", "*.log", "*.html")
RUN_FOLDERS = (".hydra", "checkpoints", "evaluations", "jobs", "model", "pretrain")
"""Patterns of the files, and names of the folders, that wmtp reads in the folder of a run or of a sweep."""

MAX_DEPTH = 50
STARTS = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken,
          yaml.BlockMappingStartToken)  # fmt: skip
ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def require_inside(folder: Path) -> None:
    """Check that no file that wmtp reads in the folder of a run is a link to a place outside this folder.

    Raises:
        InputError: there is such a link, or an entry that is neither a file nor a folder.
    """
    root = folder.resolve()

    def _check(path: Path) -> None:
        """Raise an error if the path leads out of the folder."""
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise InputError(f"{path}: is a link out of the run's folder; replace it with a copy if you trust it")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: is neither a file nor a folder; remove it")

    for pattern in (*RUN_FILES, *RUN_FOLDERS):
        for path in folder.glob(pattern):
            _check(path)
            for parent, folders, files in os.walk(path):
                for name in (*folders, *files):
                    _check(Path(parent, name))


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
