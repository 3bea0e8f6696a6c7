"""Control the lifetime, the CPU cores and the arguments of processes.

This module imports few packages, because a worker process imports it first and must start quickly.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from wmtp.errors import InputError

PR_SET_PDEATHSIG = 1


JOB_OPTION = "--job"
"""First argument of a command that runs a job of a sweep. The second argument is the file with the composed job."""
PARENT_VARIABLE = "WMTP_PARENT"
"""Environment variable of a process that is to end when another process dies. It contains the id of that process."""


def kill_on_parent_death(launcher: int) -> None:
    """Make this process end when its launcher dies. If the launcher is already dead, end this process now.

    `launcher` is the process id of the launcher, which must be the parent of this process.
    """
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
    """Return whether the process with this id is running. A process that has ended as a zombie is not running."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def run_with_timeout(seconds: float, call: Callable[[], object]) -> bool:
    """Run `call` in a thread, and return whether it ended within `seconds`.

    If `call` raises an error within this time, raise the same error. If it does not end in time, it continues in its
    thread.
    """
    failures: list[BaseException] = []

    def _run() -> None:
        """Run the call, and keep its exception."""
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


LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher such as torchrun sets in each process of a run."""
MAX_PORT = 65_535
CORES_VARIABLE = "WMTP_CORES"
"""Environment variable of a sweep's job. It contains the number of CPU cores that the job may use."""


def num_cores() -> int:
    """Return the number of CPU cores that this process may use.

    The jobs of a sweep that run at the same time share the available cores. Therefore each job may use only a part.
    """
    if CORES_VARIABLE in os.environ:
        return int(os.environ[CORES_VARIABLE])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads() -> None:
    """In a job of a sweep, limit the number of torch's threads to the number of the job's CPU cores.

    The limit does not apply if the environment variable OMP_NUM_THREADS is set.
    """
    if CORES_VARIABLE in os.environ and "OMP_NUM_THREADS" not in os.environ:
        import torch  # already imported, so setting OMP_NUM_THREADS would have no effect

        torch.set_num_threads(num_cores())


def module_arguments(name: str) -> list[str]:
    """Return the arguments with which the Python interpreter runs a module in a new process.

    The new process searches the working directory for modules only if this process does so.
    """
    # without -P, a folder named wmtp in the working directory would be imported instead of the installed package
    options = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [*options, "-m", name]


def check_launcher_variables() -> None:
    """Check the environment variables by which a launcher such as torchrun describes the processes of a run.

    Raises:
        InputError: they name several processes, but are not complete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    given = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
    missing = [name for name in LAUNCHER_VARIABLES if name not in given]
    problems = [f"these are not set: {', '.join(missing)}"] if missing else []
    numbers = {name: value for name, value in given.items() if name != "MASTER_ADDR"}
    problems += [f"{name}={value} is no whole number" for name, value in numbers.items() if not value.isdecimal()]
    if not problems and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        problems.append(f"RANK={given['RANK']} is not below it")
    if not problems and int(given["MASTER_PORT"]) > MAX_PORT:
        problems.append(f"MASTER_PORT={given['MASTER_PORT']} is above {MAX_PORT}")
    if problems:
        raise InputError(
            f"WORLD_SIZE={given['WORLD_SIZE']} in the environment says that this is one of several processes, but "
            f"{'; '.join(problems)}. Start the processes with torchrun. If another program left these variables, run: "
            f"unset {' '.join(given)}"
        )


def started_together() -> bool:
    """Return whether a launcher such as torchrun started this process together with other processes of the same run."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
