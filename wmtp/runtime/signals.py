"""Ctrl-C and SIGTERM: at once while nothing is being trained, after the current update while something is.

The first signal ends a run in good order, the second at once, and the third kills the process.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wmtp.errors import InterruptedAtOnce
from wmtp.runtime.processes import started_together

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def raised_signals() -> Iterator[None]:
    """Inside, a signal raises `InterruptedAtOnce` wherever the program is. After the second, the next one kills."""
    count = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            _let_signals_kill()
        raise interruption(number)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Inside, these signals do nothing: for the few lines that record how a run ended."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers or SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def closes_in_peace() -> bool:
    """Whether SIGTERM does nothing here, since this process has failed and closes what it has opened."""
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def interruption(number: int) -> InterruptedAtOnce:
    """What a signal raises where nothing waits for it."""
    return InterruptedAtOnce(number, f"interrupted by {signal.Signals(number).name}")


class DeferredSignals:
    """Inside, the first signal is only noted in `received`; a second raises `InterruptedAtOnce`, a third kills.

    After an error in one of several processes, SIGTERM does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "DeferredSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, Exception) and started_together():
            # the launcher ends this process as soon as another one has failed, but what it opened wants closing
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # or else the next one is to kill
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            _let_signals_kill()
            raise interruption(number)
        self.received = number


def _let_signals_kill() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
