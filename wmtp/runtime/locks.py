"""File locks between processes, with a fallback for file systems without locks."""

import errno
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems without locks."""
POLL_S = 0.2


class LockHeld(Exception):
    """Another process holds the lock, and this process stopped waiting for it."""


@contextmanager
def file_lock(path: Path, should_give_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system releases it even if the process is killed.

    Args:
        path: the lock file; it is created if necessary.
        should_give_up: called several times a second while another process holds the lock; True ends the wait.

    Raises:
        LockHeld: another process holds the lock, and `should_give_up` returned True.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while not try_lock(file.fileno(), fcntl.LOCK_EX):
            if should_give_up():
                raise LockHeld(f"another process holds {path}")
            time.sleep(POLL_S)
        yield


def try_lock(descriptor: int, kind: int) -> bool:
    """Take a lock on an open file until it is closed; return False if another process holds the lock.

    `kind` is `fcntl.LOCK_EX` or `fcntl.LOCK_SH`. On a file system without locks, log a warning and return True.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("this file system has no locks, so two processes may use the same files at once: %s", error)
    return True
