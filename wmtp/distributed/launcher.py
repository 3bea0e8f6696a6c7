"""Start the processes of a run (workers) on this machine with torch's elastic launcher, and handle their end."""

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

from wmtp.distributed.exit_reports import ExitReport, FolderReportStore, root_cause
from wmtp.distributed.worker import CONTEXT_FILE, CONTEXT_VARIABLE, ready_files
from wmtp.errors import ProcessFailed
from wmtp.runtime.processes import is_alive, num_cores
from wmtp.runtime.run_dir import JobProgress
from wmtp.runtime.signals import SIGNALS, interrupt_error

log = logging.getLogger(__name__)
EXIT_GRACE_S = 8.0
"""Seconds after the end of one worker until the other workers are killed. A longer time is not needed, because the
workers wait for each other before they end."""
START_GRACE_S, SECOND_SIGNAL_GRACE_S = 3.0, 5.0
"""Seconds after a signal until the workers are killed. The first number applies to a signal that arrives while the
workers start, and the second number applies to the second of two later signals."""
UNUSED_SIGNAL = "SIGURG"
"""The only signal that torch's launcher is configured to handle, although it is never sent. This module handles and
forwards SIGINT and SIGTERM instead."""


def launch(entry: list[str], size: int, context: dict[str, Any], progress: JobProgress) -> ExitReport:
    """Run a job in several new processes on this machine, and return the exit report of rank 0.

    Args:
        entry: arguments of the Python interpreter that starts each process.
        size: number of processes.
        context: input of the job, as plain JSON values. Each process receives it.
        progress: an object in which this function records the last step and the stop reason of the job.

    Raises:
        InputError, PendingError, SandboxUnavailable, ProcessFailed: a process failed. The error describes the failure
            that ended the run.
        InterruptedRun: the run was interrupted by a signal.
    """
    with tempfile.TemporaryDirectory(prefix="wmtp-") as name:
        workers = Workers(Path(name), size)
        (workers.folder / CONTEXT_FILE).write_text(json.dumps(context | {"launcher": os.getpid()}))
        with workers.supervised(), _worker_environment(workers.folder, size):
            failures = _run_elastic(entry, size, workers.folder)
        reports = FolderReportStore(workers.folder).read()
    progress.step = max((report.step for report in reports.values()), default=0)
    for report in reports.values():
        progress.stop_reason = progress.stop_reason or report.stop_reason
        if report.traceback:
            log.info("process %d ended with exit code %d:\n%s", report.rank, report.exit_code, report.traceback)
    in_order = sorted(failures.items(), key=lambda failure: failure[1][0] != workers.first_exited)
    exit_codes = {rank: code for rank, (pid, code) in in_order if pid not in workers.killed}
    found = root_cause(reports, exit_codes, workers.received)
    if found is not None:
        is_same_everywhere = len(reports) == size and all(each.message == found.message for each in reports.values())
        raise found.error(omit_rank=is_same_everywhere)
    if len(reports) < size:  # exit codes do not matter here: a process may crash at exit, after its report
        unexplained = ProcessFailed("the processes ended without an exit report")
        raise unexplained if workers.received is None else interrupt_error(workers.received)
    return reports[0]


class Workers:
    """The workers of a launcher. Signals are forwarded to the workers, and workers that hang are killed."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.received: int | None = None
        """Number of the first signal that the launcher received; None before a signal."""
        self.killed: set[int] = set()
        """Process ids of the workers that the launcher killed."""
        self.first_exited: int | None = None
        """Process id of the worker that ended first; None while all workers run."""
        self._pids: set[int] = set()
        self._deadline: float | None = None
        self._done = threading.Event()

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Forward signals to the workers while the context is active.

        If one worker ends, the other workers have `EXIT_GRACE_S` seconds to end. Then they are killed.
        """
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
        ready = [int(file.read_text()) for file in ready_files(self.folder)]
        if first and len(ready) < self.size:  # some workers still start, so there is no state to save
            self._deadline = time.monotonic() + START_GRACE_S
            raise interrupt_error(number)
        for pid in filter(is_alive, ready):
            _send(number, pid)
        if not first:
            self._deadline = time.monotonic() + SECOND_SIGNAL_GRACE_S

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            if len(self._pids) < self.size:
                self._pids |= {child.pid for child in psutil.Process().children() if self._is_worker(child)}
            if self.first_exited is None and (exited := [pid for pid in self._pids if not is_alive(pid)]):
                self.first_exited = exited[0]
                self._deadline = self._deadline or time.monotonic() + EXIT_GRACE_S
            if self._deadline is not None and time.monotonic() > self._deadline:
                for pid in filter(is_alive, self._pids):
                    self.killed.add(pid)
                    _send(signal.SIGKILL, pid)

    def _is_worker(self, child: psutil.Process) -> bool:
        try:
            return bool(child.environ().get(CONTEXT_VARIABLE) == str(self.folder / CONTEXT_FILE))
        except psutil.Error:  # the process has just started or ended
            return False


def _send(number: int, pid: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


@contextmanager
def _worker_environment(folder: Path, size: int) -> Iterator[None]:
    """Set environment variables for the workers while the context is active. Restore the previous ones afterwards."""
    before = dict(os.environ)
    os.environ[CONTEXT_VARIABLE] = str(folder / CONTEXT_FILE)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // size)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_elastic(entry: list[str], size: int, folder: Path) -> dict[int, tuple[int, int]]:
    """Start the workers, and wait until all of them have ended.

    Returns:
        The process id and the exit code of each worker that failed, by rank.
    """
    _log_to_files_only("torch.distributed.elastic")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=folder.name, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
        signals_to_handle=UNUSED_SIGNAL, logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*entry)
    except ChildFailedError as error:
        return {rank: (failure.pid, failure.exitcode) for rank, failure in error.failures.items()}
    return {}


def _log_to_files_only(name: str) -> None:
    """Make a logger write only to the log files, and no longer to the console."""
    logger = logging.getLogger(name)
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    logger.handlers, logger.propagate = [logging.NullHandler(), *files], False
