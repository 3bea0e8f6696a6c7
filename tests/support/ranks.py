"""Two processes that tests run functions in, as the ranks of one gloo group; started once, since torch takes long."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

SIZE = 2
START = 60
"""Seconds for both to start, and to import what the function is made of."""


class Outcome(NamedTuple):
    """What a function gave in one rank: its value, or the traceback of its error; and after how many seconds."""

    value: Any
    error: str | None
    seconds: float


class Ranks:
    """Runs functions of test modules in both ranks at once."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 10.0) -> list[Any]:
        """What the function returns in each rank; an error in one of them is an error here."""
        outcomes = self.outcomes(function, *arguments, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            assert outcome.error is None, f"in rank {rank}:\n{outcome.error}"
        return [outcome.value for outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *arguments: Any, timeout: float = 10.0) -> list[Outcome]:
        """What happened in each rank. A collective that waits longer than `timeout` seconds fails."""
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes:
                pipe.send((function, arguments, Path(folder) / "rendezvous", timeout))
            for pipe in self.pipes:
                if not pipe.poll(START + 6 * timeout):
                    self._tell_where_they_are()
                    self.stop()
                    raise TimeoutError(f"{function.__name__} did not end in a rank")
            try:
                return [pipe.recv() for pipe in self.pipes]
            except EOFError:  # gloo ends a process in which two different collectives met
                self.stop()
                raise

    def stop(self) -> None:
        """End both processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []

    def _tell_where_they_are(self) -> None:
        """Have each process write the stacks of its threads to standard error."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)  # one after the other, not line by line

    def _start(self) -> None:
        if self.processes:
            return
        context = multiprocessing.get_context("spawn")
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)


def _serve(rank: int, pipe: Connection) -> None:
    faulthandler.enable()  # a process that crashes says where
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    while True:
        function, arguments, rendezvous, timeout = pipe.recv()
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=timeout)
        )
        dist.barrier()  # one that left before the other had joined would take it along
        value, error, started = None, None, time.monotonic()
        try:
            value = function(*arguments)
        except BaseException:
            error = traceback.format_exc()
        seconds = time.monotonic() - started
        # A group must not go with the last model of DDP that refers to it: that one's end waits for the group's threads
        # and lets none of them have the interpreter, which they may be waiting for.
        gc.collect()
        dist.destroy_process_group()
        pipe.send(Outcome(value, error, seconds))
