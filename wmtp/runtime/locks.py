"""Hold locks on files. A lock excludes other processes.

If a file system does not support locks, the functions log a warning and behave as if the lock had been obtained.
"""

import errno
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Numbers of the errors that a file system without locks raises."""
POLL_S = 0.2


class LockHeld(Exception):
    """An error that reports that another process holds a lock and that this process stopped waiting for it."""


@contextmanager
def file_lock(path: Path, should_give_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold an exclusive lock on a file while the context is active. Wait while another process holds the lock.

    The operating system also releases the lock if this process is killed.

    Args:
        path: path of the lock file. The file is created if it does not exist.
        should_give_up: function that is called several times a second during the wait. If it returns True, the wait
            ends.

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
    """Lock an open file until it is closed. Return False if another process holds a conflicting lock.

    `kind` is `fcntl.LOCK_EX` (exclusive) or `fcntl.LOCK_SH` (shared). On a file system without locks, log a warning and
    return True.
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
