"""Letting one process at a time do something, also where the file system cannot say which."""

import errno
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer."""
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
    with path.open("a") as file:
        while not is_taken(file.fileno(), fcntl.LOCK_EX):
            if gives_up():
                raise HeldByAnother(f"another process holds {path}")
            time.sleep(LOOK_EVERY)
        yield


def is_taken(descriptor: int, kind: int) -> bool:
    """Take a lock until the file is closed, unless another process has it; whether this process may go on.

    `kind` is `fcntl.LOCK_EX` or `fcntl.LOCK_SH`. A file system without locks lets everybody go on, and it is said.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("this file system has no locks, so nothing keeps two processes apart: %s", error)
    return True
