"""Tests of the background sender: retries, time limits and cancellation."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from wmtp.runtime import background as module
from wmtp.runtime.background import BackgroundSender, Cancelled


class Server:
    """A server that fails while `is_down`; it counts calls and the maximum number of concurrent calls."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.is_down, self.seconds = False, seconds
        self.calls = self.num_done = self.in_progress = self.max_in_progress = 0

    def call(self) -> str:
        self.calls += 1
        self.in_progress += 1
        self.max_in_progress = max(self.max_in_progress, self.in_progress)
        time.sleep(self.seconds)
        self.in_progress -= 1
        if self.is_down:
            raise OSError("is down")
        self.num_done += 1
        return "thanks"


def start_sender(server: Server, count: int) -> BackgroundSender:
    """Return a started sender that makes `count` calls to a server."""

    def send() -> None:
        for _ in range(count):
            sender.retry(server.call)

    sender = BackgroundSender("the server", send)
    sender.start()
    return sender


def wait_until_done(sender: BackgroundSender, stall_s: float, limit_s: float) -> float:
    """Wait for the sender, and return the seconds that this took."""
    started = time.monotonic()
    assert sender.wait_until_done(stall_s, limit_s) == sender.is_done
    return time.monotonic() - started


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_failed_calls_are_retried_and_failure_and_recovery_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.is_down = True
    with caplog.at_level(logging.INFO):
        sender = start_sender(server, 3)
        wait_for(lambda: server.calls > 2)
        assert not sender.is_done and str(sender.last_error) == "is down"
        server.is_down = False
        wait_until_done(sender, 10, 10)
    assert sender.is_done and server.num_done == 3 and sender.last_error is None
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "the server failed and is tried again: OSError: is down",
        "the server works again",
    ], "only the first failure and the recovery are warnings"


def test_a_failing_server_gets_one_call_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(BackgroundSender, "_pause", lambda self, seconds: pauses.append(seconds))
    server = Server()
    server.is_down = True

    def recover(self: BackgroundSender, attempt: object) -> None:
        server.is_down = server.calls < 200

    monkeypatch.setattr(BackgroundSender, "_note_failure", recover)
    sender = start_sender(server, 1)
    wait_until_done(sender, 10, 10)
    assert sender.is_done and server.max_in_progress == 1
    assert max(pauses) <= module.MAX_PAUSE_S, "a pause is longer than half a minute"
    assert sum(pauses[-100:]) > 20 * sum(pauses[:5]), "the pauses do not grow"
    assert len({round(pause, 3) for pause in pauses[-100:]}) > 50, (
        "the pauses are not random, so many clients would retry at the same time"
    )


@pytest.mark.slow
def test_sending_is_given_up_for_a_dead_server_but_not_for_a_slow_one() -> None:
    dead, slow = Server(), Server(seconds=0.2)
    dead.is_down = True
    dead_sender, slow_sender = start_sender(dead, 1), start_sender(slow, 10)
    wait_for(lambda: dead_sender.last_error is not None)
    assert 0.3 < wait_until_done(dead_sender, stall_s=0.5, limit_s=60) < 3 and not dead_sender.is_done
    assert wait_until_done(slow_sender, stall_s=0.5, limit_s=60) > 1 and slow_sender.is_done, (
        "sending to a slow server was given up"
    )


@pytest.mark.slow
def test_heartbeats_keep_a_slow_upload_alive() -> None:
    """The control sends no heartbeats, and is cancelled between two failed parts."""
    done = {}
    for has_heartbeat in (True, False):
        finished = threading.Event()

        def send(has_heartbeat: bool = has_heartbeat) -> None:
            for _ in range(15):
                time.sleep(0.1)
                if has_heartbeat:
                    sender.heartbeat()  # noqa: B023
                sender.last_error = OSError("one of the parts")  # noqa: B023
            finished.set()  # noqa: B023

        sender = BackgroundSender("the server", send)
        sender.start()
        wait_until_done(sender, stall_s=0.4, limit_s=60)
        done[has_heartbeat] = sender.is_done
        assert finished.wait(5)
    assert done == {True: True, False: False}


def test_the_limit_holds_for_a_working_server_and_the_thread_ends(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(seconds=0.2)
    sender = start_sender(server, 100)
    assert 0.4 < wait_until_done(sender, stall_s=60, limit_s=0.5) < 2 and not sender.is_done and sender.is_cancelled
    server.is_down = True
    wait_for(lambda: not sender._thread.is_alive())
    assert server.calls < 20


def test_closing_ends_a_pause_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without closing, the pause would last 30 s."""
    monkeypatch.setattr(module, "wait_random_exponential", lambda **limits: lambda state: 30.0)
    server = Server()
    server.is_down = True
    sender = start_sender(server, 1)
    wait_for(lambda: sender.last_error is not None)
    server.is_down = False
    assert wait_until_done(sender, stall_s=20, limit_s=20) < 5 and sender.is_done


@pytest.mark.slow
def test_an_unanswered_call_is_given_up_unless_its_deadline_was_extended() -> None:
    """The second sender extends the deadline before the slow call."""
    done = {}
    for extends in (False, True):

        def send(extends: bool = extends) -> None:
            sender.retry(time.sleep, 0.01)  # noqa: B023
            if extends:
                sender.extend_deadline(5)  # noqa: B023
            sender.retry(time.sleep, 1.5)  # noqa: B023

        sender = BackgroundSender("the server", send)
        sender.start()
        wait_until_done(sender, stall_s=0.3, limit_s=60)
        done[extends] = sender.is_done
        sender._thread.join()
    assert done == {False: False, True: True}


def test_no_call_starts_after_cancellation() -> None:
    server = Server(seconds=0.3)
    sender = start_sender(server, 10)
    wait_until_done(sender, stall_s=60, limit_s=0.1)
    sender._thread.join()
    assert server.calls <= 2 and isinstance(sender.last_error, Cancelled)
