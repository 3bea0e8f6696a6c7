"""One process at a time, and questions that may not be answered."""

import errno
import fcntl
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from wmtp.runtime.atomic_files import size_of
from wmtp.runtime.locks import HeldByAnother, one_at_a_time
from wmtp.runtime.processes import answers_within


def hold(path: Path, ready: str) -> None:
    """What another process does."""
    with one_at_a_time(path):
        Path(ready).touch()
        time.sleep(60)


def test_a_lock_is_waited_for_given_up_and_freed_by_death(tmp_path: Path) -> None:
    path, ready = tmp_path / "some" / "lock", tmp_path / "ready"
    other = multiprocessing.get_context("fork").Process(target=hold, args=(path, str(ready)))
    other.start()
    while not ready.exists():
        time.sleep(0.01)
    asked: list[int] = []

    def third_time() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(HeldByAnother, match="another process holds"), one_at_a_time(path, third_time):
        pass
    threading.Timer(0.3, other.kill).start()
    with one_at_a_time(path):
        assert not other.is_alive() or other.join(5) is None


def test_a_file_system_without_locks_is_said_and_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The control is an error of another kind."""

    def fails_with(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, "flock")

        monkeypatch.setattr(fcntl, "flock", flock)

    fails_with(errno.EOPNOTSUPP)
    with one_at_a_time(tmp_path / "lock"):
        assert "has no locks" in caplog.text
    fails_with(errno.EIO)
    with pytest.raises(OSError, match="flock"), one_at_a_time(tmp_path / "lock"):
        pass


def test_a_question_is_not_waited_for_longer_than_said() -> None:
    started = time.monotonic()
    assert not answers_within(0.2, lambda: time.sleep(5)) and time.monotonic() - started < 2
    assert answers_within(5, lambda: None)
    with pytest.raises(ZeroDivisionError):
        answers_within(5, lambda: 1 / 0)


def test_a_folders_size_is_found_while_files_come_and_go(tmp_path: Path) -> None:
    """Without regard for that, it would raise within a fraction of a second."""
    (tmp_path / "stays").write_bytes(b"12345")
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            staged = tmp_path / "staged"
            staged.touch()
            staged.rename(tmp_path / "there")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {size_of(tmp_path) for _ in range(3000)} == {5}
    finally:
        stop.set()
        thread.join()
    assert size_of(tmp_path / "missing") == 0
