"""Commands that count the calls of their start: `COUNTS=FILE python -m tests.support.counting train …`.

Each call is one line of the file: the process id, the kind of the call and, for a hash, the path of the hashed file.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

CALLS = {
    "composition": ("hydra._internal.config_loader_impl", "ConfigLoaderImpl.load_configuration"),
    "check": ("wmtp.training.validate", "check_training"),
    "evaluation_check": ("wmtp.evaluation.validate", "check_evaluation"),
    "algorithm": ("wmtp.algorithms.critic", "Critic.__init__"),
    "hash": ("wmtp.checkpoint.manifest", "file_hash"),
}
"""The module and the function of each kind of call."""


def count_calls(file: Path, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Append a line to `file` for each call of a function in `CALLS`. `replace` replaces an attribute of an object."""
    for kind, (module, path) in CALLS.items():
        owner: Any = import_module(module)
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        replace(owner, name, counted(getattr(owner, name), kind, file))


def counted(function: Callable[..., Any], kind: str, file: Path) -> Callable[..., Any]:
    """Return a function that appends a line to `file`, and then calls `function`."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        hashed = str(arguments[0]) if kind == "hash" else ""
        of_defaults = kind == "composition" and not options["overrides"]  # the changed keys are found by comparison
        with file.open("a") as opened:
            opened.write(f"{os.getpid()} {'defaults' if of_defaults else kind} {hashed}\n")
        return function(*arguments, **options)

    return call


def read_calls(file: Path) -> list[tuple[int, str, str]]:
    """Return the process id, the kind and the hashed file of each call."""
    found = []
    for line in file.read_text().splitlines():
        pid, kind, hashed = line.split(" ", 2)
        found.append((int(pid), kind, hashed))
    return found


if __name__ == "__main__":
    count_calls(Path(os.environ["COUNTS"]))
    job = import_module("wmtp.cli.job")
    job.module_arguments = lambda name: ["-m", "tests.support.counting", "train"]  # type: ignore[attr-defined]
    command = import_module(f"wmtp.{sys.argv[1]}").COMMAND
    sys.argv[1:2] = []
    import_module("wmtp.cli.runner").run(command)
