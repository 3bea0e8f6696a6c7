"""Send the data of a run to a server from a background thread, with retries."""

import logging
import textwrap
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tenacity import RetryCallState, Retrying, stop_when_event_set, wait_random_exponential

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

log = logging.getLogger(__name__)
FIRST_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_AT_END_S = 0.25, 30.0, 1.0
"""Longest pauses in seconds between two attempts of a call: before the second attempt, after which it doubles with each
attempt; during training; and while the run closes. After seven failures, the pauses took 32 seconds at most."""
FAILING_SERVER_GRACE_S = 5.0
"""Shortest time in seconds that a closing run waits for a server that does not respond. It applies if the server had
already stopped responding before the run began to close. A shorter `stall_s` takes precedence."""
SHUTDOWN_STALL_S, SHUTDOWN_LIMIT_S = 5.0, 40.0
"""Upper bounds of the arguments of `wait_until_done` after a run has failed or was interrupted. They are short, because
such a run is often killed soon."""
POLL_S = 0.1


class Cancelled(Exception):
    """An error that reports that sending was cancelled before the first attempt of a call."""


class BackgroundSender:
    """A thread that sends data to one server and repeats calls that fail.

    A call that fails is repeated at growing intervals. The thread makes no other call until this call succeeds. While
    the run closes, sending is cancelled if the server does not respond for too long.
    """

    def __init__(self, server: str, send: Callable[[], None]) -> None:
        """Create the thread without starting it.

        Args:
            server: name of the server, which is used in messages.
            send: function that the thread runs. It must return when all data are sent, and must make every call to the
                server through `retry`.
        """
        self.server, self._send = server, send
        self.is_done = False
        """True after the function `send` has returned without an error."""
        self.last_error: Exception | None = None
        """Error of the last call, if it failed; None after a call has succeeded."""
        self._alive_at = self._closing_at = time.monotonic()
        self._num_pending_calls = 0
        self._closing, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=server, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_closing(self) -> bool:
        """True after the run has begun to close. From then on, no new data appear."""
        return self._closing.is_set()

    @property
    def is_cancelled(self) -> bool:
        """True after sending was cancelled. Then the function `send` should return."""
        return self._cancelled.is_set()

    def wait(self, seconds: float) -> bool:
        """Pause before the next search for new data. The pause ends early when the run closes.

        Returns:
            Whether the run is closing.
        """
        self.heartbeat()
        return self._closing.wait(seconds)

    def heartbeat(self) -> None:
        """Record that the server has just responded, for example because it has received a part of a large file."""
        self.extend_deadline(0)

    def extend_deadline(self, seconds: float) -> None:
        """Record that the server has just responded, and add `seconds` to the time allowed for its next response."""
        self._alive_at = time.monotonic() + seconds

    def retry(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Repeat a call to the server until it succeeds, and return its result.

        If sending is cancelled after the first attempt, raise the error of the last attempt.

        Raises:
            Cancelled: sending was cancelled before the first attempt.
        """
        if self.is_cancelled:
            raise Cancelled(f"{self.server} was given up before this call")
        retrying = Retrying(
            stop=stop_when_event_set(self._cancelled),
            wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=MAX_PAUSE_S),
            sleep=self._pause,
            after=self._note_failure,
            reraise=True,
        )
        self._num_pending_calls += 1
        try:
            result = retrying(call, *args, **kwargs)
        finally:
            self._num_pending_calls -= 1
        if self.last_error is not None:
            log.warning("%s works again", self.server)
            self.last_error = None
        self.heartbeat()
        return result

    def wait_until_done(self, stall_s: float, limit_s: float, on_tick: Callable[[], None] | None = None) -> bool:
        """Wait until all data are sent or sending is cancelled.

        Args:
            stall_s: number of seconds after which sending is cancelled if the server does not respond to a call.
            limit_s: number of seconds after which sending is cancelled in any case.
            on_tick: function that is called several times a second during the wait.

        Returns:
            Whether all data were sent.
        """
        self._closing_at = time.monotonic()
        self._closing.set()
        try:
            while self._thread.is_alive() and not self._should_cancel(stall_s, limit_s):
                if on_tick is not None:
                    on_tick()
                self._thread.join(POLL_S)
        finally:
            self._cancelled.set()
        return self.is_done

    def _should_cancel(self, stall_s: float, limit_s: float) -> bool:
        now = time.monotonic()
        waited = now - self._closing_at
        is_failing = self.last_error is not None or self._num_pending_calls > 0
        is_stalled = is_failing and now - self._alive_at > stall_s
        return waited > limit_s or (is_stalled and waited > min(stall_s, FAILING_SERVER_GRACE_S))

    def _run(self) -> None:
        try:
            self._send()
            self.is_done = True
        except Exception as error:  # it would be lost with the thread; the caller of `wait_until_done` reports it
            self.last_error = error
            log.warning("%s did not accept everything: %s", self.server, format_error(error))
            log.debug("traceback:", exc_info=error)

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt of a call.

        The pause ends early when the run begins to close. While the run closes, pauses are short.
        """
        if self._closing.is_set():
            self._cancelled.wait(min(seconds, MAX_PAUSE_AT_END_S))
        else:
            self._closing.wait(seconds)

    def _note_failure(self, attempt: RetryCallState) -> None:
        """Log a failed attempt of a call.

        The first failed attempt is logged as a warning, which appears in the terminal. Later attempts are logged as
        info, which appears only in the log file.
        """
        error = attempt.outcome.exception() if attempt.outcome else None
        if isinstance(error, Exception):
            self.last_error = error
            level = logging.WARNING if attempt.attempt_number == 1 else logging.INFO
            log.log(level, "%s failed and is tried again: %s", self.server, format_error(error))


def format_error(error: Exception) -> str:
    """Return the type and the message of an exception as one line of text. A long message is shortened."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 500)}"
