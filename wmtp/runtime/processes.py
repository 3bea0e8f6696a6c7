"""Lifetime, timeouts, CPU cores and arguments of processes. Imports little: worker processes import it first."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1


def kill_on_parent_death(launcher: int) -> None:
    """Make the system kill this process when its launcher dies; exit now if the launcher is already dead."""
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot set the parent-death signal")
    else:
        threading.Thread(target=_exit_with_launcher, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:
        os._exit(1)


def _exit_with_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


def is_alive(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def run_with_timeout(seconds: float, call: Callable[[], object]) -> bool:
    """Run a call in a thread and return whether it ended within `seconds`. An error of the call is raised.

    After a timeout, the call continues in its thread.
    """
    failures: list[BaseException] = []

    def _run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised below, in the calling thread
            failures.append(error)

    thread = threading.Thread(target=_run, name="call with timeout", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return not thread.is_alive()


CORES_VARIABLE = "WMTP_CORES"
"""Environment variable with the number of CPU cores of a job of a sweep."""


def num_cores() -> int:
    """Return the number of CPU cores for this process. In a sweep, concurrent jobs share the available cores."""
    if CORES_VARIABLE in os.environ:
        return int(os.environ[CORES_VARIABLE])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads() -> None:
    """Limit torch's threads to the cores of a sweep's job, unless the user set OMP_NUM_THREADS."""
    if CORES_VARIABLE in os.environ and "OMP_NUM_THREADS" not in os.environ:
        import torch  # already imported, so setting OMP_NUM_THREADS would have no effect

        torch.set_num_threads(num_cores())


def module_arguments(name: str) -> list[str]:
    """Return the interpreter arguments that run a module as this process would import it."""
    # without -P, a folder named wmtp in the working directory would be imported instead of the installed package
    options = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [*options, "-m", name]


def started_together() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
