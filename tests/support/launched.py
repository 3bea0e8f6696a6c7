"""A command with several processes, for the tests of the launcher: `python -m tests.support.launched tags.action=…`."""

import ctypes
import os
import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # same as in the commands of wmtp

import torch

from wmtp.cli import runner
from wmtp.cli.command import Command
from wmtp.cli.job import JobContext
from wmtp.cli.runner import run as main
from wmtp.config.overrides import chosen_run_dir
from wmtp.config.schema import CheckedConfig
from wmtp.distributed import launcher, membership, store, watchdog
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError, InterruptedRun
from wmtp.runtime import signals
from wmtp.runtime.signals import DeferredSignals

ERRORS = {"value": ValueError, "close": InputError}
WITHOUT = os.environ.get("WITHOUT", "")
"""Mechanisms to disable, for tests that show their effect."""
if "kill_on_parent_death" in WITHOUT:
    runner.kill_on_parent_death = lambda launcher: None
if "watchdog" in WITHOUT:
    watchdog.ABORT_GRACE_S = watchdog.CLOSE_GRACE_S = 1e9
if "joining" in WITHOUT and os.environ.get("RANK") == "1":
    os._exit(3)
if "shutdown" in WITHOUT:
    store.send_shutdown = lambda exit_code: None  # type: ignore[assignment]
if "patience" in WITHOUT:
    store.WAIT_NOTICE_S = 0.1
if "initializing" in WITHOUT and os.environ.get("RANK") == "1":
    membership.dist.init_process_group = lambda *arguments, **options: 1 / 0
if "exit_codes" in WITHOUT:
    launcher.Workers.exit_codes = lambda self: {}  # type: ignore[method-assign]
if "upload_barrier" in WITHOUT:
    membership.UPLOAD_BARRIER_S = 1
if "second" in WITHOUT:
    signals.interrupt_error = lambda number: os.kill(os.getpid(), number)  # type: ignore[assignment,return-value]


def job(context: JobContext) -> float:
    """Run the steps, then the action in `tags.action`; return the last sum."""
    processes, action = Processes(), context.config.tags.get("action")
    Path(context.folder / f"pid-{processes.rank}").write_text(str(os.getpid()))
    try:
        total = steps(context, processes, action)
    finally:
        if action == "close":
            time.sleep(2)
            Path(context.folder / f"closed-{processes.rank}").touch()
    context.progress.stop_reason = "all done"
    if action == "upload" and processes.is_main:
        time.sleep(6)
    print(f"process {processes.rank}: the last sum is {total}", flush=True)
    return total


def steps(context: JobContext, processes: Processes, action: str | None) -> float:
    """Run steps of one all-reduce each, with the action in `tags.action` at step 5; return the last sum."""
    with DeferredSignals() as received:
        for step in range(1, 10**6 if action in (None, "hang") else 11):
            if step == 5 and action in ERRORS and processes.rank == 1:
                raise ERRORS[action]("out of luck")
            if step == 5 and action == "hang" and processes.rank == 0:
                Path(context.folder / "hangs").touch()
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                ctypes.CDLL(None).sleep(60)  # like a collective of NCCL, it cannot be interrupted
            total = processes.sum(torch.ones(1)).item()
            number = int(processes.max(received.received or 0)[0])
            context.progress.step = step
            Path(context.folder / f"step-{processes.rank}").write_text(str(step))
            if number:
                (context.folder / f"saving-{processes.rank}").touch()
                time.sleep(context.config.tags.get("saving", 0.0) if processes.rank == 0 else 0)
                raise InterruptedRun(number, f"interrupted after update {step}, which is saved")
            time.sleep(0.02)
    return total


def folder(checked: CheckedConfig, overrides: list[str]) -> Path | None:
    """Return the run folder that the user has chosen."""
    return chosen_run_dir(overrides)


COMMAND = Command(
    "train",
    job,
    lambda config, overrides: CheckedConfig(config, []),
    folder,
    num_processes=lambda config: int(config.hardware.num_processes),
)

if __name__ == "__main__":
    main(COMMAND)
