"""Tests of file locks, timeouts and folder sizes."""

import errno
import fcntl
import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from wmtp.runtime.atomic_files import folder_size
from wmtp.runtime.locks import LockHeld, file_lock
from wmtp.runtime.processes import run_with_timeout


def hold(path: Path, ready: str) -> None:
    """Hold a lock in another process."""
    with file_lock(path):
        Path(ready).touch()
        time.sleep(60)


def test_waiting_for_a_lock_can_be_given_up_and_process_death_releases_it(tmp_path: Path) -> None:
    path, ready = tmp_path / "some" / "lock", tmp_path / "ready"
    other = multiprocessing.get_context("fork").Process(target=hold, args=(path, str(ready)))
    other.start()
    while not ready.exists():
        time.sleep(0.01)
    calls: list[int] = []

    def give_up_third_time() -> bool:
        calls.append(1)
        return len(calls) == 3

    with pytest.raises(LockHeld, match="another process holds"), file_lock(path, give_up_third_time):
        pass
    threading.Timer(0.3, other.kill).start()
    with file_lock(path):
        assert not other.is_alive() or other.join(5) is None


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Control: any other error is raised."""

    def fail_with(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, "flock")

        monkeypatch.setattr(fcntl, "flock", flock)

    fail_with(errno.EOPNOTSUPP)
    with file_lock(tmp_path / "lock"):
        assert "has no locks" in caplog.text
    fail_with(errno.EIO)
    with pytest.raises(OSError, match="flock"), file_lock(tmp_path / "lock"):
        pass


def test_run_with_timeout_returns_in_time() -> None:
    started = time.monotonic()
    assert not run_with_timeout(0.2, lambda: time.sleep(5)) and time.monotonic() - started < 2
    assert run_with_timeout(5, lambda: None)
    with pytest.raises(ZeroDivisionError):
        run_with_timeout(5, lambda: 1 / 0)


def test_folder_size_works_while_files_change(tmp_path: Path) -> None:
    """Without handling of missing files, it would fail within a fraction of a second."""
    (tmp_path / "stays").write_bytes(b"12345")
    stop = threading.Event()

    def move_files() -> None:
        while not stop.is_set():
            staged = tmp_path / "staged"
            staged.touch()
            staged.rename(tmp_path / "there")

    thread = threading.Thread(target=move_files)
    thread.start()
    try:
        assert {folder_size(tmp_path) for _ in range(3000)} == {5}
    finally:
        stop.set()
        thread.join()
    assert folder_size(tmp_path / "missing") == 0
