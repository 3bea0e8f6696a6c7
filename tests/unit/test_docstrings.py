"""Tests of the docstrings of the package: each public definition has one, and it starts with plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wmtp.config.schema import PACKAGE

UNCLEAR_START = re.compile(r"(What|Of|That of|Those of|Whether|How|Where)\b")
MODULES = sorted(PACKAGE.rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield all classes and functions, including nested ones."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Definition))


def problems(source: str) -> list[str]:
    """Return the definitions whose docstring is missing or starts with an unclear word."""
    tree, found = ast.parse(source), []
    for node in [tree, *definitions(tree)]:
        name = getattr(node, "name", "the module")
        docstring = ast.get_docstring(node)  # type: ignore[arg-type]
        if docstring is None and not name.startswith("_"):
            found.append(f"{name} has no docstring")
        elif docstring is not None and UNCLEAR_START.match(docstring):
            found.append(f"{name}: {docstring.splitlines()[0]}")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_exist_and_start_with_plain_words(module: Path) -> None:
    assert problems(module.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(): pass",
        '"""What f is."""\ndef f():\n    """Return 1."""',
        '"""A module."""\ndef f():\n    """Return 1."""\n    def g(): pass',
        '"""A module."""\nclass C:\n    """Of a run: its steps."""',
    ],
)
def test_control_a_missing_docstring_and_an_unclear_start_are_found(source: str) -> None:
    assert problems(source) != []
