"""Store exit reports, in which each rank of a run records how it ended, and find the root cause of the run's end."""

import json
import re
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from wmtp.distributed.process_group import OtherProcessFailed
from wmtp.errors import (
    InputError,
    InterruptedRun,
    PendingError,
    ProcessFailed,
    SandboxUnavailable,
    WmtpError,
)
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import JobProgress

FAILED, INTERRUPTED, PEER_FAILED, FINISHED = "failed", "interrupted", "peer_failed", "finished"
"""Ways in which a rank can end: by its own error, by a signal, because another rank failed, or with success."""
CONNECTION_ERROR = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out (after )?waiting|tcpstore", re.IGNORECASE
)
"""Pattern of torch.distributed's error messages about a lost connection to another rank. It is needed because the gloo
backend has no error class for this case."""
ERROR_CLASSES: dict[int, type[WmtpError]] = {
    kind.exit_code: kind for kind in (InputError, PendingError, SandboxUnavailable)
}
"""Class of the error to raise, by exit code of a rank. For every other exit code, the class is `ProcessFailed`."""


@dataclass(frozen=True)
class ExitReport:
    """A record of how one rank ended. All fields are plain values, because the report is stored as JSON."""

    rank: int
    end: str
    """How the rank ended: `FAILED`, `INTERRUPTED`, `PEER_FAILED` or `FINISHED`."""
    exit_code: int = 0
    message: str = ""
    traceback: str = ""
    step: int = 0
    stop_reason: str | None = None
    value: float | None = None
    """The number that the job returned on this rank, if any."""
    time: float = 0.0
    """Time at which the rank ended, in seconds since 1970 (`time.time`)."""

    @classmethod
    def from_error(cls, error: BaseException, rank: int, progress: JobProgress) -> "ExitReport":
        """Return the report of a rank that ended with the given error."""
        kind = "" if isinstance(error, (WmtpError, InterruptedRun)) else f"{type(error).__name__}: "
        return cls(
            rank,
            _classify(error),
            getattr(error, "exit_code", 1) or 1,
            f"{kind}{error}",
            "".join(traceback.format_exception(error)),
            progress.step,
            progress.stop_reason,
            time=time.time(),
        )

    def error(self, omit_rank: bool) -> BaseException:
        """Return the error that the main process raises. Its message contains the rank unless `omit_rank` is True."""
        if self.end == INTERRUPTED:
            return InterruptedRun(self.exit_code - 128, self.message)
        message = self.message if omit_rank else f"process {self.rank}: {self.message}"
        return ERROR_CLASSES.get(self.exit_code, ProcessFailed)(message)


class ExitReportStore(Protocol):
    """A store of exit reports that all ranks share."""

    def put(self, report: ExitReport) -> None:
        """Store the report of a rank. It replaces an earlier report of the same rank."""

    def read(self) -> dict[int, ExitReport]:
        """Return all stored reports, by rank."""


class FolderReportStore:
    """A store that keeps exit reports in a folder. All ranks must have access to this folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, report: ExitReport) -> None:
        """Store the report of a rank. It replaces an earlier report of the same rank."""
        replace_atomically(self.folder / f"exit_report-{report.rank}.json", encode_report(report))

    def read(self) -> dict[int, ExitReport]:
        """Return all stored reports, by rank."""
        reports = [ExitReport(**json.loads(path.read_text())) for path in self.folder.glob("exit_report-*.json")]
        return {report.rank: report for report in reports}


def encode_report(report: ExitReport) -> bytes:
    """Return a report as JSON. If the report's `value` is infinite or NaN, it becomes null."""
    fields = asdict(report)
    try:
        return encode_json(fields)
    except ValueError:
        return encode_json(fields | {"value": None})


def root_cause(
    reports: Mapping[int, ExitReport], exit_codes: Mapping[int, int], received_signal: int | None
) -> ExitReport | None:
    """Return the report of the rank that caused the end of a run, or None if every rank finished.

    The rank is selected in this order:

    1. a rank that ended without a report, unless SIGTERM ended it,
    2. a rank that failed with its own error,
    3. a rank that was interrupted by a signal,
    4. a rank that ended without a report because of SIGTERM, which torch's launcher sends to the remaining ranks after
       a failure,
    5. a rank that failed because of another rank.

    If there are several such ranks, the one that ended first is selected. Among interrupted ranks, however, the lowest
    rank is selected, because its message contains the path of the saved checkpoint. Cases 1 and 4 do not apply if the
    run received a signal.

    Args:
        reports: exit reports by rank.
        exit_codes: exit codes by rank, in the order in which the processes ended. They contain only the processes that
            failed and that the launcher did not kill. A negative code is the number of the signal that ended the
            process.
        received_signal: number of the signal that the run received, or None if it received no signal.
    """
    killed = [
        ExitReport(rank, FAILED, 1, _describe_exit_code(code))
        for rank, code in exit_codes.items()
        if code and rank not in reports and received_signal is None
    ]
    by_launcher = [report for report in killed if -exit_codes[report.rank] == signal.SIGTERM]
    by_time = sorted(reports.values(), key=lambda report: report.time)
    candidates = [report for report in killed if report not in by_launcher]
    candidates += [report for report in by_time if report.end == FAILED]
    candidates += sorted((report for report in by_time if report.end == INTERRUPTED), key=lambda report: report.rank)
    if received_signal is not None and not candidates and any(report.end == PEER_FAILED for report in by_time):
        message = f"interrupted by {signal.Signals(received_signal).name}"
        return ExitReport(0, INTERRUPTED, 128 + received_signal, message)
    candidates += by_launcher + [report for report in by_time if report.end == PEER_FAILED]
    return candidates[0] if candidates else None


def _describe_exit_code(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code} and without an exit report"
    return f"was ended by {signal.Signals(-code).name}"


def _classify(error: BaseException) -> str:
    """Return `INTERRUPTED`, `PEER_FAILED` or `FAILED`, depending on the error that ended a rank."""
    if isinstance(error, InterruptedRun):
        return INTERRUPTED
    if isinstance(error, OtherProcessFailed):
        return PEER_FAILED
    is_connection_error = isinstance(error, RuntimeError) and CONNECTION_ERROR.search(str(error)) is not None
    return PEER_FAILED if is_connection_error else FAILED
