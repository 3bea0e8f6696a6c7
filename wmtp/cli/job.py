"""Execution of a command's job in a group of processes."""

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
"""Maximum time in seconds that a rank waits until the other ranks have ended, after all ranks raised an error."""
UPLOAD_BARRIER_S = 24 * 3600.0
"""Maximum time in seconds that all other ranks wait while rank 0 uploads the remaining data of the run."""
COLLECTIVE_ERRORS = (InterruptedRun, PendingError, TrainingError)
"""Errors that are raised either on all ranks or on no rank."""


@dataclass(frozen=True)
class JobContext:
    """The input of a job. It also contains the object in which the job records its progress."""

    config: DictConfig
    folder: Path
    overrides: list[str]
    """Overrides in Hydra's syntax from which the config was composed."""
    progress: JobProgress = field(default_factory=JobProgress)
    """Progress of the job, such as the last step. The job updates this object while it runs."""


Job = Callable[[JobContext], float | None]


def encode_context(context: JobContext) -> dict[str, Any]:
    """Return a job context as plain values that can be sent to another process.

    Interpolations in the config are not resolved, because a training stage may change the keys to which they refer.
    """
    job_logging = HydraConfig.get().job_logging
    return {
        "config": OmegaConf.to_yaml(context.config),
        "folder": str(context.folder),
        "overrides": context.overrides,
        "logging": OmegaConf.to_container(job_logging, resolve=True),
    }


def decode_context(values: Mapping[str, Any]) -> JobContext:
    """Create a job context from the values that `encode_context` returned."""
    setup_globals()
    config = OmegaConf.create(values["config"])
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return JobContext(config, Path(values["folder"]), list(values["overrides"]))


def launch(job: Job, context: JobContext, size: int) -> float | None:
    """Run a job in `size` new processes on this machine, and return the result of the job on rank 0."""
    from wmtp.distributed.launcher import launch as launch_workers

    name = job.__module__ if job.__module__ != "__main__" else sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    report = launch_workers(module_arguments(name), size, encode_context(context), context.progress)
    return report.value


def run_rank0(job: Job, context: JobContext, on_hang: Callable[[BaseException], None]) -> float | None:
    """Run a job on rank 0 of a process group that torchrun started.

    Args:
        job: the job that every rank runs.
        context: input of the job, which is also sent to the other ranks.
        on_hang: function that is called if another rank failed and this process hangs. It receives the error that
            ended the run.
    """
    from wmtp.distributed.exit_reports import FAILED, PEER_FAILED
    from wmtp.distributed.process_group import OtherProcessFailed
    from wmtp.distributed.rendezvous import RendezvousReportStore, share_context

    share_context(encode_context(context))
    report_store = RendezvousReportStore()

    def _report_hang(dead_rank: int) -> int:
        """Report the root cause of the failure, and return its exit code."""
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
    """End all other ranks that torchrun started, because there is no job to run. They exit with `exit_code`."""
    from wmtp.distributed.rendezvous import shutdown_workers as send_shutdown

    send_shutdown(exit_code)


def _find_root_cause(report_store: "ExitReportStore") -> BaseException | None:
    """Find the error that ended the run in the exit reports of all ranks, and log the tracebacks of the other ranks.

    Returns:
        The error, or None if no report contains one.
    """
    from wmtp.distributed.exit_reports import root_cause

    reports = report_store.read()
    for report in reports.values():
        if report.rank and report.traceback:
            log.info("process %d ended with exit code %d:\n%s", report.rank, report.exit_code, report.traceback)
    first = root_cause(reports, {}, None)
    return None if first is None else first.error(omit_rank=first.rank == 0)


def run_worker(job: Job) -> NoReturn:
    """Wait until rank 0 sends a job context, and run the job. Torchrun started this process with a rank above 0."""
    from wmtp.distributed.rendezvous import RendezvousReportStore, wait_for_context

    def _run() -> int:
        """Wait for the context of rank 0, run the job, and return the exit code."""
        values = wait_for_context()
        if "exit_code" in values:
            return int(values["exit_code"])
        _run_received(job, values, RendezvousReportStore())
        return 0

    _run_and_exit(_run)


def run_launched_worker(job: Job) -> NoReturn:
    """Run a job in a process that `launch` started."""
    values, folder = receive_context()
    # imported here, because it imports torch; before the signal handlers are set, a signal ends this process quietly
    from wmtp.distributed.exit_reports import FolderReportStore

    def _run() -> int:
        """Run the job with the received context, and return exit code 0."""
        mark_ready(folder)
        _run_received(job, values, FolderReportStore(folder))
        return 0

    _run_and_exit(_run)


def _run_received(job: Job, values: Mapping[str, Any], report_store: "ExitReportStore") -> None:
    """Run a job whose context was received from another process."""
    from wmtp.distributed.exit_reports import ExitReport

    try:
        set_up_output(values["logging"])
        context = decode_context(values)
    except BaseException as error:
        report_store.put(ExitReport.from_error(error, int(os.environ["RANK"]), JobProgress()))
        raise
    run_in_group(job, context, report_store)


def _run_and_exit(run: Callable[[], int]) -> NoReturn:
    """Call `run`, and end this process with the exit code that `run` returns.

    If `run` raises an error or is interrupted by a signal, the process ends with the exit code of that error. The error
    is not printed here, because it was already stored in an exit report.
    """
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
        job: the job that every rank runs.
        context: input of the job.
        report_store: store of the exit reports of all ranks.
        on_hang: function that is called if another process died and this process hangs because of that. It receives
            the rank of the dead process and returns the exit code for this process.
    """
    from wmtp.distributed.device import resolve_device
    from wmtp.distributed.exit_reports import FINISHED, ExitReport
    from wmtp.distributed.process_group import OtherProcessFailed, Processes, join_group, leave_group
    from wmtp.distributed.rendezvous import common_store
    from wmtp.distributed.watchdog import Watchdog

    rank, hardware = int(os.environ["RANK"]), context.config.hardware

    def _report_hang(dead_rank: int) -> int:
        """Report that another rank died, unless this rank has reported an error itself. Return the exit code."""
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
