"""Whether processes live, and workers that do not outlive their launcher. Imports little, for workers begin with it."""

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


def answers_within(seconds: float, question: Callable[[], object]) -> bool:
    """Whether a call came to an end in time; what it raised is raised here. One that did not goes on in its thread."""
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            question()
        except BaseException as error:  # noqa: BLE001 - it is raised below, in the thread that asked
            failures.append(error)

    thread = threading.Thread(target=ask, name="question", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return not thread.is_alive()


SHARE = "WMTP_CORES"
"""In the environment of a sweep's job: its share of the machine's cores, where several jobs run at once."""


def num_cores() -> int:
    """The share of a sweep's job, or all cores that the system lets this process use."""
    if SHARE in os.environ:
        return int(os.environ[SHARE])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to_share() -> None:
    """Let torch compute in as many threads as the job has cores, unless the user has said how many."""
    if SHARE in os.environ and "OMP_NUM_THREADS" not in os.environ:
        import torch  # was imported before, when OMP_NUM_THREADS could not be known

        torch.set_num_threads(num_cores())


def module_arguments(name: str) -> list[str]:
    """What an interpreter is to be told, to run a module that this process would import."""
    # with -m alone a folder that happens to be named wmtp would win over what is installed
    searched = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [*searched, "-m", name]


def started_together() -> bool:
    """Whether a launcher, such as torchrun, started this process together with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
