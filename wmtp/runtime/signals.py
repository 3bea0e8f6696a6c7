"""Handling of Ctrl-C (SIGINT) and SIGTERM: during training after the current update, otherwise at once.

The first signal ends a run with a checkpoint, the second ends it at once, and the third kills the process.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wmtp.errors import InterruptedAtOnce
from wmtp.runtime.processes import started_together

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `InterruptedAtOnce` when a signal arrives in the block. The third signal kills the process."""
    count = 0

    def _interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            _let_signals_kill()
        raise interrupt_error(number)

    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignore_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Ignore these signals (default: all of `SIGNALS`) in the block, while the end of a run is recorded."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers or SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_sigterm_ignored() -> bool:
    """Return whether SIGTERM is ignored, because this process failed and is closing files and connections."""
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def interrupt_error(number: int) -> InterruptedAtOnce:
    """Return the exception for a signal that ends the run at once."""
    return InterruptedAtOnce(number, f"interrupted by {signal.Signals(number).name}")


class DeferredSignals:
    """A context in which the first signal only sets `received`.

    The second signal raises `InterruptedAtOnce`, and the third kills the process. If an error leaves the context in one
    of several processes, SIGTERM is ignored from then on.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "DeferredSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, Exception) and started_together():
            # the launcher sends SIGTERM once another process failed, but files and connections must be closed first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # otherwise the next signal kills
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            _let_signals_kill()
            raise interrupt_error(number)
        self.received = number


def _let_signals_kill() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
