"""A bar that shows how many jobs of a sweep have ended."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SweepProgress:
    """The bar of a sweep, with the elapsed and the remaining time. Nothing is shown if the output is not a terminal."""

    def __init__(self, console: Console, total: int, done: int, *, is_live: bool) -> None:
        """Create a bar for `total` jobs, of which `done` have ended.

        If `is_live` is true, the bar stays on the last line of the terminal. Otherwise, it is printed again after each
        job, because the running job shows its own bar.
        """
        self._console, self._is_live = console, is_live and console.is_terminal
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True)
        self._bar = Progress(TextColumn("jobs"), *columns, console=console)
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._is_live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._is_live:
            self._bar.stop()

    def advance(self) -> None:
        """Show that one more job has ended."""
        self._bar.advance(self._task)
        if self._console.is_terminal and not self._is_live:
            self._console.print(self._bar.get_renderable())
