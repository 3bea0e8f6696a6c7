"""Delivering in the background: patience with a server that fails, and none with one that is dead."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from wmtp.runtime import background as module
from wmtp.runtime.background import Courier, NobodyWaits


class Server:
    """Fails as long as `is_down`; counts the calls, and how many there were at a time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.is_down, self.seconds = False, seconds
        self.calls = self.taken = self.at_once = self.most_at_once = 0

    def call(self) -> str:
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.seconds)
        self.at_once -= 1
        if self.is_down:
            raise OSError("is down")
        self.taken += 1
        return "thanks"


def deliver(server: Server, count: int) -> Courier:
    """A courier, on its way with so many things for a server."""

    def do() -> None:
        for _ in range(count):
            courier.retried(server.call)

    courier = Courier("the server", do)
    courier.start()
    return courier


def finish(courier: Courier, patience: float, limit: float) -> float:
    """End it; the seconds that this took."""
    started = time.monotonic()
    for _ in courier.finish(patience, limit):
        pass
    return time.monotonic() - started


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_fails_is_tried_again_until_it_is_taken_and_both_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.is_down = True
    with caplog.at_level(logging.INFO):
        courier = deliver(server, 3)
        wait_for(lambda: server.calls > 2)
        assert not courier.is_done and str(courier.last_error) == "is down"
        server.is_down = False
        finish(courier, 10, 10)
    assert courier.is_done and server.taken == 3 and courier.last_error is None
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "the server failed and is tried again: OSError: is down",
        "the server is back",
    ], "a terminal shows the first failure and the end of them; the others are for the log file"


def test_a_server_that_fails_is_asked_one_thing_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Courier, "_pause", lambda self, seconds: pauses.append(seconds))
    server = Server()
    server.is_down = True

    def come_back(self: Courier, attempt: object) -> None:
        server.is_down = server.calls < 200

    monkeypatch.setattr(Courier, "_note_failure", come_back)
    courier = deliver(server, 1)
    finish(courier, 10, 10)
    assert courier.is_done and server.most_at_once == 1
    assert max(pauses) <= module.LONGEST_PAUSE, "an outage of a day is noticed to have ended within half a minute"
    assert sum(pauses[-100:]) > 20 * sum(pauses[:5]), "the control would be equal pauses"
    assert len({round(pause, 3) for pause in pauses[-100:]}) > 50, "many that wait do not all come back at once"


@pytest.mark.slow
def test_a_dead_server_is_given_up_and_a_slow_one_is_not() -> None:
    dead, slow = Server(), Server(seconds=0.2)
    dead.is_down = True
    given_up, patient = deliver(dead, 1), deliver(slow, 10)
    wait_for(lambda: given_up.last_error is not None)
    assert 0.3 < finish(given_up, patience=0.5, limit=60) < 3 and not given_up.is_done
    assert finish(patient, patience=0.5, limit=60) > 1 and patient.is_done, "it answers, if only after longer than that"


@pytest.mark.slow
def test_a_large_thing_that_moves_is_waited_for() -> None:
    """The control does not say that it moves: between two failures of its parts too much time passes."""
    done = {}
    for says_so in (True, False):
        moving = threading.Event()

        def do(says_so: bool = says_so) -> None:
            for _ in range(15):
                time.sleep(0.1)
                if says_so:
                    courier.moved()  # noqa: B023
                courier.last_error = OSError("one of the parts")  # noqa: B023
            moving.set()  # noqa: B023

        courier = Courier("the server", do)
        courier.start()
        finish(courier, patience=0.4, limit=60)
        done[says_so] = courier.is_done
        assert moving.wait(5)
    assert done == {True: True, False: False}


def test_the_limit_holds_whatever_the_server_does_and_the_thread_ends(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(seconds=0.2)
    courier = deliver(server, 100)
    assert 0.4 < finish(courier, patience=60, limit=0.5) < 2 and not courier.is_done and courier.is_abandoned
    server.is_down = True
    wait_for(lambda: not courier._thread.is_alive())
    assert server.calls < 20


def test_the_end_cuts_a_pause_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is a pause that nothing ends."""
    monkeypatch.setattr(module, "wait_random_exponential", lambda **limits: lambda state: 30.0)
    server = Server()
    server.is_down = True
    courier = deliver(server, 1)
    wait_for(lambda: courier.last_error is not None)
    server.is_down = False
    assert finish(courier, patience=20, limit=20) < 5 and courier.is_done


@pytest.mark.slow
def test_a_call_that_nobody_answers_is_given_up_unless_it_is_known_to_take_long() -> None:
    """The control is told before that the answer takes long."""
    done = {}
    for expects in (False, True):

        def do(expects: bool = expects) -> None:
            courier.retried(time.sleep, 0.01)  # noqa: B023
            if expects:
                courier.expect(5)  # noqa: B023
            courier.retried(time.sleep, 1.5)  # noqa: B023

        courier = Courier("the server", do)
        courier.start()
        finish(courier, patience=0.3, limit=60)
        done[expects] = courier.is_done
        courier._thread.join()
    assert done == {False: False, True: True}


def test_nothing_is_begun_for_whom_nobody_waits() -> None:
    server = Server(seconds=0.3)
    courier = deliver(server, 10)
    finish(courier, patience=60, limit=0.1)
    courier._thread.join()
    assert server.calls <= 2 and isinstance(courier.last_error, NobodyWaits)
