"""The membership of this process in the process group of a run, from the first contact to the last."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from wmtp.distributed.exit_reports import FAILED, FINISHED, PEER_FAILED, ExitReport, ExitReports, root_cause
from wmtp.distributed.process_group import OtherProcessFailed, Processes
from wmtp.distributed.store import common_store, wait_for_ranks
from wmtp.distributed.watchdog import Watchdog
from wmtp.errors import InterruptedAtOnce, InterruptedRun, PendingError, TrainingError
from wmtp.runtime.signals import ignore_signals

log = logging.getLogger(__name__)
EXIT_BARRIER_S = 90.0
"""Maximum time in seconds that a rank waits until the other ranks have ended, after all ranks raised an error."""
UPLOAD_BARRIER_S = 24 * 3600.0
"""Maximum time in seconds that all other ranks wait while rank 0 uploads the remaining data of the run."""
REPORT_WAIT_S = 1.0
"""Time in seconds that rank 0 leaves to the rank that failed first, so that it can write its exit report."""
COLLECTIVE_ERRORS = (InterruptedRun, PendingError, TrainingError)
"""Errors that are raised either on all ranks or on no rank."""


def no_exit_codes() -> dict[int, int]:
    """Return no exit codes. Only the launcher of a run knows those of its processes."""
    return {}


@contextmanager
def process_group(
    device: torch.device,
    timeout: float,
    exit_codes: Callable[[], Mapping[int, int]] = no_exit_codes,
    on_hang: Callable[[BaseException], None] = lambda error: None,
) -> Iterator[Processes]:
    """Be a rank of a run's process group while the context is active.

    The environment variables of torchrun describe the group. Each rank records how it ended. If one of them fails, the
    others end, too: by an error of their next collective operation, or by the watchdog. On rank 0, the context then
    raises the error that ended the run, even if this error was raised on another rank.

    Args:
        device: device of this rank.
        timeout: seconds after which a collective operation fails.
        exit_codes: returns the exit codes of the processes of this run that have ended, by rank.
        on_hang: called before the watchdog ends this process. Its argument is the error that ended the run.

    Raises:
        OtherProcessFailed: another rank failed.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = common_store()
    reports = ExitReports(store, size)

    def _report_hang(error: BaseException) -> int:
        """Report the reason for which the watchdog ends this rank, and return the exit code."""
        if rank not in reports.read():
            reports.put(ExitReport.from_error(error, rank))
        error = (_find_cause(reports, exit_codes) if rank == 0 else None) or error
        on_hang(error)
        return getattr(error, "exit_code", 1)

    watchdog: Watchdog | None = None
    try:
        watchdog = Watchdog(rank, wait_for_ranks(store, rank, size, exit_codes), store, _report_hang)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the group blocks its connection to the store while it waits for a rank, so the watchdog needs another one
        connection = store.clone()  # type: ignore[attr-defined] # missing in torch's stubs
        group_store, limit = PrefixStore("group", connection), timedelta(seconds=timeout)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=limit)
        yield Processes()
        reports.put(ExitReport(rank, FINISHED, time=time.time()))
        watchdog.exit_barrier(UPLOAD_BARRIER_S)
    except BaseException as error:
        with ignore_signals():  # torchrun sends SIGTERM to the other ranks as soon as one of them ends
            report = ExitReport.from_error(error, rank)
            reports.put(report if watchdog is None else watchdog.attribute_failure(report))
            if watchdog is not None:
                _leave_after_error(error, watchdog)
            if rank == 0 and report.end != FAILED:
                if report.end == PEER_FAILED:
                    time.sleep(REPORT_WAIT_S)
                if (cause := _find_cause(reports, exit_codes)) is not None:
                    raise cause from None
        raise
    dist.destroy_process_group()


def _leave_after_error(error: BaseException, watchdog: Watchdog) -> None:
    """Tell the other ranks about an error of this rank. If all ranks raised it, wait for them and leave the group."""
    is_collective = dist.is_initialized() and isinstance(error, COLLECTIVE_ERRORS)
    if not is_collective or isinstance(error, InterruptedAtOnce):
        watchdog.report_failure()
        return
    try:
        watchdog.exit_barrier(EXIT_BARRIER_S)
    except OtherProcessFailed as peer_error:
        log.info("%s", peer_error)
    dist.destroy_process_group()


def _find_cause(reports: ExitReports, exit_codes: Callable[[], Mapping[int, int]]) -> BaseException | None:
    """Return the error that ended the run, or None if no rank failed. Log the tracebacks of the other ranks."""
    found = reports.read()
    for report in found.values():
        if report.rank and report.traceback:
            log.info("process %d ended with exit code %d:\n%s", report.rank, report.exit_code, report.traceback)
    first = root_cause(found, exit_codes())
    return None if first is None else first.error()
