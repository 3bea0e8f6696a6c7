"""Ctrl-C and SIGTERM: at once while nothing is being trained, after the current update while something is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wmtp.errors import InterruptedRun

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def raised_signals() -> Iterator[None]:
    """Inside, the first signal raises `InterruptedRun` wherever the program is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise InterruptedRun(number, f"interrupted by {signal.Signals(number).name}")

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class DeferredSignals:
    """Inside, the first signal is only noted in `received`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "DeferredSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
