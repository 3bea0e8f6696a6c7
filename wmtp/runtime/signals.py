"""Handle Ctrl-C (SIGINT), SIGTERM, and SIGHUP, which the loss of a terminal sends.

During training, the first signal ends the run after the current update, with a checkpoint. The second signal ends the
run at once, and the third kills the process. Outside training, the first signal already ends the run at once. A command
that was started with nohup ignores SIGHUP. After another signal, SIGHUP has no effect, because the system and the shell
both send it when a terminal is closed.
"""

import atexit
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wmtp.errors import InterruptedAtOnce
from wmtp.runtime.processes import started_together
from wmtp.runtime.standard_streams import notify

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """Return the signals to handle: all of `SIGNALS`, but not SIGHUP if it is ignored."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `InterruptedAtOnce` if one of `SIGNALS` arrives while the context is active.

    The second signal raises the error again, and the third signal kills the process.
    """
    count = 0

    def _interrupt(number: int, frame: FrameType | None) -> None:
        """Raise the signal as an error. After the second signal, the next one kills the process."""
        nonlocal count
        if count and number == signal.SIGHUP:
            return
        count += 1
        if count > 1:
            _let_signals_kill()
        raise interrupt_error(number)

    before = {number: signal.signal(number, _interrupt) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignore_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Ignore the given signals while the context is active. Without arguments, ignore `SIGNALS`.

    This is used while the end of a run is recorded.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers or SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_exit_code() -> None:
    """Let the next signal have no effect, because the process is about to exit with a code that says how it ended.

    The second signal kills the process, in case that it hangs. While the interpreter itself ends, signals are ignored.
    """
    for number in handled_signals():
        signal.signal(number, lambda *_: _let_signals_kill())
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


def is_sigterm_ignored() -> bool:
    """Return whether this process ignores SIGTERM.

    It does so after an error, while it closes files and connections.
    """
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def interrupt_error(number: int) -> InterruptedAtOnce:
    """Return the exception to raise if the signal with this number ends the run at once."""
    return InterruptedAtOnce(number, f"interrupted by {signal.Signals(number).name}")


class DeferredSignals:
    """A context in which the first of `SIGNALS` only sets `received` to the number of the signal.

    The second signal raises `InterruptedAtOnce`, and the third signal kills the process. If the context ends with an
    error in a run with several processes, this process ignores SIGTERM from then on.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "DeferredSignals":
        self._before = {number: signal.signal(number, self._note) for number in handled_signals()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, Exception) and started_together():
            # torchrun sends SIGTERM once another process failed, but files and connections must be closed first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # otherwise the next signal kills
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            notify(f"{signal.Signals(number).name}: the run ends after this update; a second signal ends it at once")
        elif number != signal.SIGHUP:
            _let_signals_kill()
            raise interrupt_error(number)


def _let_signals_kill() -> None:
    for number in handled_signals():
        signal.signal(number, signal.SIG_DFL)
