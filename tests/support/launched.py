"""A command for the tests of launching: `python -m tests.support.launched tags.act=…`, a job in several processes."""

import ctypes
import os
import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the package's own commands do

import torch
from omegaconf import DictConfig

from wmtp.cli import job as tasks
from wmtp.cli.command import Command
from wmtp.cli.job import Task
from wmtp.cli.runner import run as main
from wmtp.config.overrides import named_folder
from wmtp.distributed import launcher as launch
from wmtp.distributed import watchdog as peers
from wmtp.distributed import worker
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError, InterruptedRun
from wmtp.runtime import signals
from wmtp.runtime.signals import DeferredSignals

ERRORS = {"value": ValueError, "close": InputError}
WITHOUT = os.environ.get("WITHOUT", "")
"""What is left out, to show what it is for."""
if "die_with" in WITHOUT:
    worker.die_with = lambda launcher: None
if "peers" in WITHOUT:
    peers.GRACE = peers.GRACE_TO_CLOSE = 1e9
if "last_words" in WITHOUT:
    launch.LAST_WORDS = 1e9
if "farewell" in WITHOUT:
    peers.Peers.part = lambda self, patience: None  # type: ignore[method-assign]
if "patience" in WITHOUT:
    tasks.DELIVERY = 1
if "second" in WITHOUT:
    signals.interruption = lambda number: os.kill(os.getpid(), number)  # type: ignore[assignment,return-value]


def job(task: Task) -> float:
    """Steps, and then what comes after them."""
    processes, act = Processes(), task.config.tags.get("act")
    Path(task.folder / f"pid-{processes.rank}").write_text(str(os.getpid()))
    try:
        total = steps(task, processes, act)
    finally:
        if act == "close":
            time.sleep(2)
            Path(task.folder / f"closed-{processes.rank}").touch()
    task.ending.stop_reason = "all done"
    if act == "deliver" and processes.is_main:
        time.sleep(6)
    print(f"process {processes.rank} says {total}", flush=True)
    return total


def steps(task: Task, processes: Processes, act: str | None) -> float:
    """Steps of one all-reduce each, until `tags.act` happens at step 5."""
    with DeferredSignals() as received:
        for step in range(1, 10**6 if act in (None, "hang") else 11):
            if step == 5 and act in ERRORS and processes.rank == 1:
                raise ERRORS[act]("out of luck")
            if step == 5 and act == "hang" and processes.rank == 0:
                Path(task.folder / "hangs").touch()
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                ctypes.CDLL(None).sleep(60)  # as a collective of NCCL, it is not interrupted and knows of nobody
            total = processes.sum(torch.ones(1)).item()
            number = int(processes.largest(received.received or 0)[0])
            task.ending.step = step
            Path(task.folder / f"step-{processes.rank}").write_text(str(step))
            if number:
                (task.folder / f"saving-{processes.rank}").touch()
                time.sleep(task.config.tags.get("saving", 0.0) if processes.rank == 0 else 0)
                raise InterruptedRun(number, f"interrupted after update {step}, which is saved in there")
            time.sleep(0.02)
    return total


def folder(config: DictConfig, overrides: list[str]) -> Path | None:
    """What the user named."""
    return named_folder(overrides)


COMMAND = Command(
    "train",
    job,
    lambda config: [],
    folder,
    num_processes=lambda config: int(config.hardware.num_processes),
)

if __name__ == "__main__":
    main(COMMAND)
