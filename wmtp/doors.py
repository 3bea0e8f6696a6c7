"""The commands as functions: what the installed scripts call, and `python -m` too."""

import importlib
import signal
import sys
from types import ModuleType
from typing import NoReturn


def train() -> NoReturn:
    """`wmtp-train`."""
    open_door("train")


def evaluate() -> NoReturn:
    """`wmtp-evaluate`."""
    open_door("evaluate")


def generate() -> NoReturn:
    """`wmtp-generate`."""
    open_door("generate")


def compare() -> NoReturn:
    """`wmtp-compare`."""
    open_door("compare")


def export() -> NoReturn:
    """`wmtp-export`."""
    open_door("export")


def sync() -> NoReturn:
    """`wmtp-sync`."""
    sys.exit(module("sync").main())


def open_door(name: str) -> NoReturn:
    """Do what a command is told by its arguments."""
    command = module(name).COMMAND
    sys.exit(module("command").main(command))


def module(name: str) -> ModuleType:
    """Import a module of ours, which takes a second."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command listens, Ctrl-C ends this process without a word
    return importlib.import_module(f"wmtp.{name}")
