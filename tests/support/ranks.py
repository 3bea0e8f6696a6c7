"""Two processes that run test functions as the ranks of a gloo group.

They start only once, because importing torch is slow.
"""

import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

SIZE = 2
START_TIMEOUT_S = 60
"""Time limit in seconds for both processes to start and to import the function's module."""


class Outcome(NamedTuple):
    """The result of a function in one rank: its value or the traceback of its error, and its duration in seconds."""

    value: Any
    error: str | None
    seconds: float


class Ranks:
    """A pair of ranks that run functions of test modules at the same time."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 10.0) -> list[Any]:
        """Return the function's value in each rank; fail if it raises in one of them."""
        outcomes = self.outcomes(function, *arguments, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            assert outcome.error is None, f"in rank {rank}:\n{outcome.error}"
        return [outcome.value for outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *arguments: Any, timeout: float = 10.0) -> list[Outcome]:
        """Return the outcome in each rank. A collective that waits longer than `timeout` seconds fails."""
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes:
                pipe.send((function, arguments, Path(folder) / "rendezvous", timeout))
            for pipe in self.pipes:
                if not pipe.poll(START_TIMEOUT_S + 6 * timeout):
                    self._dump_stacks()
                    self.stop()
                    raise TimeoutError(f"{function.__name__} did not end in a rank")
            try:
                return [pipe.recv() for pipe in self.pipes]
            except EOFError:  # gloo ends the process when the ranks call different collectives
                self.stop()
                raise

    def stop(self) -> None:
        """Kill both processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []

    def _dump_stacks(self) -> None:
        """Make each process write the stacks of its threads to standard error."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)  # keeps the outputs of the processes apart

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


class RanksByStrategy(Ranks):
    """Ranks that run FSDP in processes of their own, because a rank once crashed in a thread of gloo after DDP runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fsdp = Ranks()

    def outcomes(self, function: Callable[..., Any], *arguments: Any, timeout: float = 10.0) -> list[Outcome]:
        """Return the outcome in each rank of the pair for the strategy that the arguments name."""
        if _names_fsdp(arguments):
            return self.fsdp.outcomes(function, *arguments, timeout=timeout)
        return super().outcomes(function, *arguments, timeout=timeout)

    def stop(self) -> None:
        """Kill the processes of both pairs."""
        super().stop()
        self.fsdp.stop()


def _names_fsdp(arguments: Sequence[Any]) -> bool:
    """Return whether the arguments, or the lists among them, contain the strategy or its override."""
    return any(
        argument in ("fsdp", "hardware.strategy=fsdp") if isinstance(argument, str) else _names_fsdp(argument)
        for argument in arguments
        if isinstance(argument, str | list | tuple)
    )


def _serve(rank: int, pipe: Connection) -> None:
    faulthandler.enable()  # a crash prints its location
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    while True:
        function, arguments, rendezvous, timeout = pipe.recv()
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=timeout)
        )
        dist.barrier()  # if a rank left before the other has joined, the other one would fail too
        value, error, started = None, None, time.monotonic()
        try:
            value = function(*arguments)
        except BaseException:
            error = traceback.format_exc()
        seconds = time.monotonic() - started
        # Free DDP models first: if the last model that refers to the group destroys it, this waits for the group's
        # threads without releasing the GIL, which these threads may need.
        gc.collect()
        dist.destroy_process_group()
        pipe.send(Outcome(value, error, seconds))
