"""Show the progress of uploads and downloads.

A terminal shows a progress bar. If the output is not a terminal, a line is printed every 30 seconds.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SECONDS_BETWEEN_LINES = 30.0


class TransferProgress:
    """Progress display of one upload or download. If `console` is None, nothing is shown."""

    def __init__(self, console: Console | None, title: str) -> None:
        self._console, self._title = console, title
        self._bar: Progress | None = None
        self._started = self._printed_at = time.monotonic()
        self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._total and self._console is not None and kind is None:
            seconds = time.monotonic() - self._started
            self._print(f"{self._title}: done after {seconds:.0f} s")

    def update(self, done: int, total: int, name: str = "") -> None:
        """Show that `done` of `total` bytes were transferred. `name` is the object that is being transferred."""
        if self._console is None:
            return
        if self._console.is_terminal:
            self._update_bar(self._console, min(done, total), total, name)
        elif not self._total or time.monotonic() - self._printed_at > SECONDS_BETWEEN_LINES:
            self._print(f"{self._title}: {decimal(min(done, total))} of {decimal(total)} {name}".rstrip())
        self._total = total

    def _print(self, text: str) -> None:
        self._printed_at = time.monotonic()
        if self._console is not None:
            self._console.print(text, soft_wrap=True, highlight=False)

    def _update_bar(self, console: Console, done: int, total: int, name: str) -> None:
        if self._bar is None:
            self._print(self._title)
            columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
            self._bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=console)
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=name.rpartition("/")[2])
