"""Starting the processes of a run on this machine by torch's elastic launcher, and living through their end."""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from wmtp.distributed.exit_reports import FolderBoard, Outcome, cause
from wmtp.distributed.worker import TASK, TASK_FILE, ready_marks
from wmtp.errors import ProcessFailed
from wmtp.runtime.processes import is_alive, num_cores
from wmtp.runtime.run_dir import Ending
from wmtp.runtime.signals import SIGNALS, interruption

log = logging.getLogger(__name__)
LAST_WORDS = 8.0
"""Seconds that the others have when a process is gone: after a farewell they need none, after a failure a few."""
GRACE, AFTER_SECOND_SIGNAL = 3.0, 5.0
"""Seconds until what is left is killed: after a signal while they start, and after a second one."""
HARMLESS = "SIGURG"
"""The signal that torch's launcher may handle: one that nobody sends, for signals are forwarded here."""


def launch(entry: list[str], size: int, task: dict[str, Any], ending: Ending) -> Outcome:
    """Do a task in `size` processes of this machine, each of them `python *entry`; the outcome of the first.

    `ending` is told how far they came.

    Raises:
        InputError, PendingError, SandboxUnavailable, ProcessFailed: what ended the run in the process that was first.
        InterruptedRun: a signal did.
    """
    with tempfile.TemporaryDirectory(prefix="wmtp-") as name:
        workers = Workers(Path(name), size)
        (workers.folder / TASK_FILE).write_text(json.dumps(task | {"launcher": os.getpid()}))
        with workers.guarded(), _environment(workers.folder, size):
            ends = _run_elastic(entry, size, workers.folder)
        outcomes = FolderBoard(workers.folder).read()
    ending.step = max((outcome.step for outcome in outcomes.values()), default=0)
    for outcome in outcomes.values():
        ending.stop_reason = ending.stop_reason or outcome.stop_reason
        if outcome.traceback:
            log.info("process %d ended with exit code %d:\n%s", outcome.rank, outcome.exit_code, outcome.traceback)
    in_order = sorted(ends.items(), key=lambda end: end[1][0] != workers.first_gone)
    deaths = {rank: code for rank, (pid, code) in in_order if pid not in workers.killed}
    found = cause(outcomes, deaths, workers.received)
    if found is not None:
        in_all = len(outcomes) == size and all(outcome.message == found.message for outcome in outcomes.values())
        raise found.error(alone=in_all)
    if len(outcomes) < size:  # not by exit codes: a process may stumble when all is done and said
        unexplained = ProcessFailed("the processes ended without a word")
        raise unexplained if workers.received is None else interruption(workers.received)
    return outcomes[0]


class Workers:
    """The workers as their launcher sees them: it passes signals on to them, and ends those that hang."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.received: int | None = None
        self.killed: set[int] = set()
        self.first_gone: int | None = None
        self._pids: set[int] = set()
        self._deadline: float | None = None
        self._done = threading.Event()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, signals go to the workers, and when one of them is gone, the others soon are."""
        before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        watch = threading.Thread(target=self._watch, name="workers", daemon=True)
        watch.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._done.set()
            watch.join()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or number
        ready = [int(mark.read_text()) for mark in ready_marks(self.folder)]
        if first and len(ready) < self.size:  # some are still starting: there is nothing worth waiting for
            self._deadline = time.monotonic() + GRACE
            raise interruption(number)
        for pid in filter(is_alive, ready):
            _send(number, pid)
        if not first:
            self._deadline = time.monotonic() + AFTER_SECOND_SIGNAL

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            if len(self._pids) < self.size:
                self._pids |= {child.pid for child in psutil.Process().children() if self._is_mine(child)}
            if self.first_gone is None and (gone := [pid for pid in self._pids if not is_alive(pid)]):
                self.first_gone = gone[0]
                self._deadline = self._deadline or time.monotonic() + LAST_WORDS
            if self._deadline is not None and time.monotonic() > self._deadline:
                for pid in filter(is_alive, self._pids):
                    self.killed.add(pid)
                    _send(signal.SIGKILL, pid)

    def _is_mine(self, child: psutil.Process) -> bool:
        try:
            return bool(child.environ().get(TASK) == str(self.folder / TASK_FILE))
        except psutil.Error:  # it has just ended, or begins
            return False


def _send(number: int, pid: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


@contextmanager
def _environment(folder: Path, size: int) -> Iterator[None]:
    """Inside, the environment is what the workers inherit."""
    before = dict(os.environ)
    os.environ[TASK] = str(folder / TASK_FILE)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // size)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_elastic(entry: list[str], size: int, folder: Path) -> dict[int, tuple[int, int]]:
    """Start the workers and wait for them all; of those that failed the process and its exit code, by rank."""
    _log_to_files_only("torch.distributed.elastic")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=folder.name, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
        signals_to_handle=HARMLESS, logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*entry)
    except ChildFailedError as error:
        return {rank: (failure.pid, failure.exitcode) for rank, failure in error.failures.items()}
    return {}


def _log_to_files_only(name: str) -> None:
    """Keep a logger's records off the console."""
    logger = logging.getLogger(name)
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    logger.handlers, logger.propagate = [logging.NullHandler(), *files], False
