"""Delivering to a server, in the background, what a run leaves on disk: retried until it is taken, or given up."""

import logging
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from tenacity import RetryCallState, Retrying, stop_when_event_set, wait_random_exponential

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

log = logging.getLogger(__name__)
LONGEST_PAUSE, LONGEST_PAUSE_AT_THE_END = 30.0, 1.0
"""Seconds between two attempts while the training goes on, and when it waits for the last of them."""
LAST_CHANCE = 5.0
"""Seconds that a server which failed before still has at the end."""
IN_HASTE, GOODBYE = 5.0, 40.0
"""Patience and limit of a run that failed or was interrupted: whoever did that may not wait long before killing it."""
LOOK_EVERY = 0.1


class NobodyWaits(Exception):
    """What was to be delivered is not wanted now any more: the end has come, and was not waited for."""


class Courier:
    """A thread that delivers something to one server, and its circuit breaker.

    While calls fail, one alone is tried again, at growing intervals, and nothing else is asked of the server. At the
    end, a server that has not answered for long is not waited for.
    """

    def __init__(self, server: str, deliver: Callable[[], None]) -> None:
        """`deliver` runs in the thread until everything is delivered; it makes every call through `retried`.

        `server` says in messages who is failing.
        """
        self.server, self._do = server, deliver
        self.is_done = False
        """Whether `deliver` has come to its end."""
        self.last_error: Exception | None = None
        """Why the last attempt failed; None after one that succeeded."""
        self._alive_at = self._ending_at = time.monotonic()
        self._num_asked = 0
        self._ending, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver, name=server, daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    @property
    def is_ending(self) -> bool:
        """Whether there will be nothing new: what is there now is all that is left to deliver."""
        return self._ending.is_set()

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits any longer: `deliver` should return soon."""
        return self._abandoned.is_set()

    def wait(self, seconds: float) -> bool:
        """Let time pass until there may be something new; True as soon as the end has come."""
        self.moved()
        return self._ending.wait(seconds)

    def moved(self) -> None:
        """Note that the server is well, as every bit of a large file shows that arrives."""
        self.expect(0)

    def expect(self, seconds: float) -> None:
        """Note that the server is well, and that its next answer may take so long."""
        self._alive_at = time.monotonic() + seconds

    def retried(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The call's result, tried until it succeeds; its last exception, once nobody waits any longer.

        Raises:
            NobodyWaits: that was so before the first attempt.
        """
        if self.is_abandoned:
            raise NobodyWaits(f"{self.server} was not waited for any longer")
        retrying = Retrying(
            stop=stop_when_event_set(self._abandoned),
            wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
            sleep=self._pause,
            after=self._note_failure,
            reraise=True,
        )
        self._num_asked += 1
        try:
            result = retrying(call, *args, **kwargs)
        finally:
            self._num_asked -= 1
        if self.last_error is not None:
            log.warning("%s is back", self.server)
            self.last_error = None
        self.moved()
        return result

    def finish(self, patience: float, limit: float) -> Iterator[None]:
        """Have the rest delivered: goes round several times a second until it is, or is given up.

        Args:
            patience: seconds since the server was last well after which, if it fails or says nothing, it is given up.
            limit: seconds after which nothing is waited for.
        """
        self._ending_at = time.monotonic()
        self._ending.set()
        try:
            while self._thread.is_alive() and not self._is_hopeless(patience, limit):
                yield
                self._thread.join(LOOK_EVERY)
        finally:
            self._abandoned.set()

    def _is_hopeless(self, patience: float, limit: float) -> bool:
        now = time.monotonic()
        waited = now - self._ending_at
        is_failing = self.last_error is not None or self._num_asked > 0
        is_hopeless = is_failing and now - self._alive_at > patience
        return waited > limit or (is_hopeless and waited > min(patience, LAST_CHANCE))

    def _deliver(self) -> None:
        try:
            self._do()
            self.is_done = True
        except Exception as error:  # a thread has nobody to raise to; whoever waits for it reports it
            self.last_error = error
            log.warning("%s did not take everything: %s", self.server, described(error))
            log.debug("the traceback:", exc_info=error)

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; the end cuts the pause short, and from then on pauses are short."""
        if self._ending.is_set():
            self._abandoned.wait(min(seconds, LONGEST_PAUSE_AT_THE_END))
        else:
            self._ending.wait(seconds)

    def _note_failure(self, attempt: RetryCallState) -> None:
        """Log a failed attempt: a call's first as a warning, which a terminal shows, its others for the log file."""
        error = attempt.outcome.exception() if attempt.outcome else None
        if isinstance(error, Exception):
            self.last_error = error
            level = logging.WARNING if attempt.attempt_number == 1 else logging.INFO
            log.log(level, "%s failed and is tried again: %s", self.server, described(error))


def described(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 500)}"
