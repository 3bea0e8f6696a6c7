"""Tests of the docstrings: public definitions and nested functions have one, and it starts with plain words."""

import ast
import re
from collections.abc import Iterator

import pytest

from wmtp.config.schema import PACKAGE

UNCLEAR_START = re.compile(r"(What|Of|That of|Those of|Whether|How|Where)\b")
MODULES = sorted(PACKAGE.rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(node: ast.AST, in_function: bool = False) -> Iterator[tuple[Definition, bool]]:
    """Yield all classes and functions below a node, each with whether it is nested in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, in_function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from definitions(child, in_function or is_function)


def problems(source: str) -> list[str]:
    """Return the definitions whose docstring is missing or starts with an unclear word.

    Private functions and methods need no docstring, but private functions nested in another function do.
    """
    tree, found = ast.parse(source), []
    for node, in_function in [(tree, False), *definitions(tree)]:
        name = getattr(node, "name", "the module")
        docstring = ast.get_docstring(node)  # type: ignore[arg-type]
        if docstring is None and (in_function or not name.startswith("_")):
            found.append(f"{name} has no docstring")
        elif docstring is not None and UNCLEAR_START.match(docstring):
            found.append(f"{name}: {docstring.splitlines()[0]}")
    return found


def test_docstrings_exist_and_start_with_plain_words() -> None:
    found = {str(module.relative_to(PACKAGE)): problems(module.read_text()) for module in MODULES}
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "def f(): pass",
        '"""What f is."""\ndef f():\n    """Return 1."""',
        '"""A module."""\ndef f():\n    """Return 1."""\n    def g(): pass',
        '"""A module."""\ndef _f():\n    if True:\n        def _g(): pass',
        '"""A module."""\nclass C:\n    """Of a run: its steps."""',
    ],
)
def test_control_a_missing_docstring_and_an_unclear_start_are_found(source: str) -> None:
    assert problems(source) != []
