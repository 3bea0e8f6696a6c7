"""Letting one process at a time do something, also where the file system cannot say which."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from wmtp.runtime.folder import NO_LOCKS

log = logging.getLogger(__name__)
LOOK_EVERY = 0.2


class HeldByAnother(Exception):
    """Another process holds a lock, and is not waited for."""


@contextmanager
def one_at_a_time(path: Path, gives_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Inside, no other process is with the same lock file; the system frees it however a process ends.

    Raises:
        HeldByAnother: another one is, and `gives_up`, which is asked several times a second, says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    while not _is_taken(lock):
        if gives_up():
            raise HeldByAnother(f"another process holds {path}")
        time.sleep(LOOK_EVERY)
    try:
        yield
    finally:
        lock.release()


def _is_taken(lock: FileLock) -> bool:
    """Take a lock, unless another process has it; whether this process may go on."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("this file system has no locks, so nothing keeps two processes apart: %s", error)
    return True
