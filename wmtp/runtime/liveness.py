"""Whether processes live, and workers that do not outlive their launcher. Imports little, for workers begin with it."""

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

PR_SET_PDEATHSIG = 1


def die_with(launcher: int) -> None:
    """From now on this process is killed when its launcher dies. If that is dead already, it ends here."""
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the parent-death signal cannot be set")
    else:
        threading.Thread(target=_follow_to_death, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:
        os._exit(1)


def _follow_to_death(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
