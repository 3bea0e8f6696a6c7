"""Run the job of a command in one process or in a process group."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from wmtp.distributed.worker import mark_ready, receive_context, set_up_output
from wmtp.errors import InterruptedAtOnce, InterruptedRun, PendingError, TrainingError
from wmtp.runtime.processes import module_arguments
from wmtp.runtime.run_dir import JobProgress
from wmtp.runtime.signals import ignore_signals, raise_on_signals

if TYPE_CHECKING:  # modules that import torch are imported inside functions, because --help must stay fast
    from wmtp.distributed.exit_reports import ExitReportStore

log = logging.getLogger(__name__)
EXIT_BARRIER_S = 90.0
"""Seconds that all ranks have to close their files and connections after an error that all of them raise."""
UPLOAD_BARRIER_S = 24 * 3600.0
"""Seconds that the other ranks wait while rank 0 uploads the remaining data of the run."""
COLLECTIVE_ERRORS = (InterruptedRun, PendingError, TrainingError)
"""Errors that are raised on all ranks or on none."""


@dataclass(frozen=True)
class JobContext:
    """The input of a job: its config, its folder and the overrides, and the object that receives its progress."""

    config: DictConfig
    folder: Path
    overrides: list[str]
    """Overrides as the user wrote them."""
    progress: JobProgress = field(default_factory=JobProgress)
    """Last step and stop reason, set by the job."""


Job = Callable[[JobContext], float | None]


def encode_context(context: JobContext) -> dict[str, Any]:
    """Return a job context as plain values for another process.

    Interpolations in the config stay unresolved, because a stage may change the keys that they refer to.
    """
    job_logging = HydraConfig.get().job_logging
    return {
        "config": OmegaConf.to_yaml(context.config),
        "folder": str(context.folder),
        "overrides": context.overrides,
        "logging": OmegaConf.to_container(job_logging, resolve=True),
    }


def decode_context(values: Mapping[str, Any]) -> JobContext:
    """Return the job context from the values of `encode_context`."""
    setup_globals()
    config = OmegaConf.create(values["config"])
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return JobContext(config, Path(values["folder"]), list(values["overrides"]))


def launch(job: Job, context: JobContext, size: int) -> float | None:
    """Run a job in `size` new processes on this machine, and return the value of rank 0."""
    from wmtp.distributed.launcher import launch as launch_workers

    name = job.__module__ if job.__module__ != "__main__" else sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    report = launch_workers(module_arguments(name), size, encode_context(context), context.progress)
    return report.value


def run_rank0(job: Job, context: JobContext, on_hang: Callable[[BaseException], None]) -> float | None:
    """Run a job on rank 0 of a process group that torchrun started.

    Args:
        job: the job of all ranks.
        context: input of the job; it is sent to the other ranks.
        on_hang: receives the root cause if another rank failed and this process must end because it hangs.
    """
    from wmtp.distributed.exit_reports import FAILED, PEER_FAILED
    from wmtp.distributed.process_group import OtherProcessFailed
    from wmtp.distributed.rendezvous import RendezvousReportStore, share_context

    share_context(encode_context(context))
    report_store = RendezvousReportStore()

    def _report_hang(dead_rank: int) -> int:
        error = _find_root_cause(report_store) or OtherProcessFailed(dead_rank, "died", 1)
        on_hang(error)
        return getattr(error, "exit_code", 1)

    try:
        return run_in_group(job, context, report_store, _report_hang)
    except BaseException:
        with ignore_signals():  # torchrun also sends SIGTERM to this process soon
            report = report_store.read().get(0)
            if report is not None and report.end == PEER_FAILED:
                time.sleep(1)  # time for the rank that failed first to write its report
            if report is not None and report.end != FAILED and (error := _find_root_cause(report_store)) is not None:
                raise error from None
        raise


def shutdown_workers(exit_code: int) -> None:
    """End the other ranks that torchrun started, because there is no job to run."""
    from wmtp.distributed.rendezvous import shutdown_workers as send_shutdown

    send_shutdown(exit_code)


def _find_root_cause(report_store: "ExitReportStore") -> BaseException | None:
    """Return the error that ended the run according to the reports of all ranks, and log their tracebacks."""
    from wmtp.distributed.exit_reports import root_cause

    reports = report_store.read()
    for report in reports.values():
        if report.rank and report.traceback:
            log.info("process %d ended with exit code %d:\n%s", report.rank, report.exit_code, report.traceback)
    first = root_cause(reports, {}, None)
    return None if first is None else first.error(omit_rank=first.rank == 0)


def run_worker(job: Job) -> NoReturn:
    """Run a job on a rank other than 0 of a process group that torchrun started: wait for its context, then run."""
    from wmtp.distributed.rendezvous import RendezvousReportStore, wait_for_context

    def _run() -> int:
        values = wait_for_context()
        if "exit_code" in values:
            return int(values["exit_code"])
        _run_received(job, values, RendezvousReportStore())
        return 0

    _run_and_exit(_run)


def run_launched_worker(job: Job) -> NoReturn:
    """Run a job in a process that `launch` started."""
    values, folder = receive_context()
    # imported here, because it imports torch, and until the signal handlers are set a signal ends this process quietly
    from wmtp.distributed.exit_reports import FolderReportStore

    def _run() -> int:
        mark_ready(folder)
        _run_received(job, values, FolderReportStore(folder))
        return 0

    _run_and_exit(_run)


def _run_received(job: Job, values: Mapping[str, Any], report_store: "ExitReportStore") -> None:
    """Run a job with a context that another process sent."""
    from wmtp.distributed.exit_reports import ExitReport

    try:
        set_up_output(values["logging"])
        context = decode_context(values)
    except BaseException as error:
        report_store.put(ExitReport.from_error(error, int(os.environ["RANK"]), JobProgress()))
        raise
    run_in_group(job, context, report_store)


def _run_and_exit(run: Callable[[], int]) -> NoReturn:
    """Call `run`, which signals may interrupt, and exit with its code. Its error is already in an exit report."""
    with raise_on_signals():
        try:
            code = run()
        except BaseException as error:  # noqa: BLE001 - run_in_group stored it, and rank 0 reports it
            code = getattr(error, "exit_code", 1)
        if code:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)  # after a failure, a normal interpreter exit may wait for the other ranks forever
    sys.exit()


def run_in_group(
    job: Job, context: JobContext, report_store: "ExitReportStore", on_hang: Callable[[int], int] | None = None
) -> float | None:
    """Run a job on this rank of a process group, and store the exit report of this rank.

    Args:
        job: the job of all ranks.
        context: input of the job.
        report_store: store of the exit reports of all ranks.
        on_hang: called with the rank of a dead process if this process hangs because of it; returns the exit code.
    """
    from wmtp.distributed.device import resolve_device
    from wmtp.distributed.exit_reports import FINISHED, ExitReport
    from wmtp.distributed.process_group import OtherProcessFailed, Processes, join_group, leave_group
    from wmtp.distributed.rendezvous import common_store
    from wmtp.distributed.watchdog import Watchdog

    rank, hardware = int(os.environ["RANK"]), context.config.hardware

    def _report_hang(dead_rank: int) -> int:
        if rank not in report_store.read():
            report_store.put(ExitReport.from_error(OtherProcessFailed(dead_rank, "died", 1), rank, context.progress))
        return 1

    watchdog: Watchdog | None = None
    timeout = float(hardware.get("timeout", 1800))
    try:
        join_group(resolve_device(hardware.device), timeout)
        watchdog = Watchdog(Processes(), common_store(), on_hang or _report_hang)
        value = job(context)
        step, reason = context.progress.step, context.progress.stop_reason
        report_store.put(ExitReport(rank, FINISHED, step=step, stop_reason=reason, value=value, time=time.time()))
        watchdog.exit_barrier(UPLOAD_BARRIER_S)
    except BaseException as error:
        with ignore_signals():
            report = ExitReport.from_error(error, rank, context.progress)
            report_store.put(report if watchdog is None else watchdog.attribute_failure(report))
        is_collective = isinstance(error, COLLECTIVE_ERRORS) and not isinstance(error, InterruptedAtOnce)
        if watchdog is not None and not is_collective:
            watchdog.report_failure()
        if watchdog is not None and is_collective:
            try:
                watchdog.exit_barrier(EXIT_BARRIER_S)
            except OtherProcessFailed as peer_error:
                log.info("%s", peer_error)
            leave_group()
        raise
    leave_group()
    return value
