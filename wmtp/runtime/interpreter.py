"""Starting our own modules in other processes."""

import sys
from pathlib import Path


def module_arguments(name: str) -> list[str]:
    """What an interpreter is to be told, to run a module that this process would import."""
    # with -m alone a folder that happens to be named wmtp would win over what is installed
    searched = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [*searched, "-m", name]
