"""Text on a terminal. A text of a stranger cannot contain escape sequences, with which it could control the terminal.

With them, a text could for example hide or replace other lines, or write to the clipboard.
"""

import io
import re
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Pattern of the characters that control a terminal, except for newlines and tabs."""


def printable(text: str) -> str:
    r"""Return a text in which an escape sequence of Python replaces each control character.

    >>> printable("a\x1b[2J\tb")
    'a\\x1b[2J\tb'
    """
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class TerminalText(io.TextIOWrapper):
    """A text stream to a terminal, which writes no control characters."""

    def write(self, text: str) -> int:
        """Write a text in its printable form."""
        return super().write(printable(text))

    @property
    def rich_proxied_file(self) -> "Unfiltered":
        """The stream to which rich writes, because its own output controls the terminal."""
        return Unfiltered(self)


class Unfiltered:
    """The stream of a `TerminalText`, to which all characters are written as they are."""

    def __init__(self, stream: TerminalText) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Console(rich.console.Console):
    """A console of rich that shows texts in their printable form on a terminal. Texts contain no markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Yield the segments of what is shown. Only segments that rich itself makes control the terminal."""
        for segment in super().render(*arguments, **options):
            is_plain = segment.control or not self.is_terminal
            yield segment if is_plain else Segment(printable(segment.text), segment.style)
