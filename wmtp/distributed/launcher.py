"""Start ranks 1, 2, … of a run as child processes of this process, which becomes rank 0."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch._C._distributed_c10d import TCPStore

from wmtp.runtime.processes import PARENT_VARIABLE, num_cores
from wmtp.runtime.signals import ignore_signals

EXIT_GRACE_S = 8.0
"""Seconds after the end of rank 0 until the other ranks are killed. Only rank 0 uploads data, so they need less."""
HOST = "127.0.0.1"


class Workers:
    """The child processes that run ranks 1, 2, … of a run."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, entry: list[str], environment: Mapping[str, str]) -> None:
        """Start the process of a rank. Ctrl-C in the terminal does not reach it, because it has its own session."""
        self._processes[rank] = subprocess.Popen(
            [sys.executable, *entry], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def exit_codes(self) -> dict[int, int]:
        """Return the exit code of each rank that has ended. A negative code is the number of a signal."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def stop(self, grace: float) -> None:
        """Wait at most `grace` seconds until all processes have ended, and kill those that have not."""
        deadline = time.monotonic() + grace
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def start_workers(entry: list[str], size: int) -> Iterator[Workers]:
    """Start the other ranks of a run, and set the environment variables of rank 0, as torchrun does.

    The ranks find each other through a key-value store in this process. Signals of the terminal reach only rank 0,
    which ends the training on all ranks. When the context ends, all workers have ended. If this process dies, they are
    killed.

    Args:
        entry: arguments of the Python interpreter that starts a worker.
        size: number of ranks, including rank 0.
    """
    server = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // size))  # torch is already imported here, and ignores the variable
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    common = {
        "MASTER_ADDR": HOST, "MASTER_PORT": str(server.port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": threads,
    }  # fmt: skip
    if sys.platform == "linux":
        common |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    before = dict(os.environ)
    os.environ.update(common | {"RANK": "0", "LOCAL_RANK": "0"})
    workers = Workers()
    grace = 0.0  # after an interruption, the other ranks have already saved, or must end at once
    try:
        for rank in range(1, size):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT_VARIABLE: str(os.getpid())}
            workers.start(rank, entry, os.environ | variables)
        yield workers
        grace = EXIT_GRACE_S
    except Exception:
        grace = EXIT_GRACE_S
        raise
    finally:
        with ignore_signals():  # the job has ended, so a signal must not change how it ended
            workers.stop(grace)
        os.environ.clear()
        os.environ.update(before)
