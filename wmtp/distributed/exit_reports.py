"""Exit reports of the ranks of a run, and the root cause of its end."""

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
"""Ends of a process: its own error, a signal, the failure of another rank, success."""
CONNECTION_ERROR = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out (after )?waiting|tcpstore", re.IGNORECASE
)
"""Messages of torch.distributed about a lost rank. With gloo there is no error class for this."""
ERROR_CLASSES: dict[int, type[WmtpError]] = {
    kind.exit_code: kind for kind in (InputError, PendingError, SandboxUnavailable)
}
"""Error class by exit code; every other code becomes a `ProcessFailed`."""


@dataclass(frozen=True)
class ExitReport:
    """The end of one rank. All fields are plain values, because the report is stored as JSON."""

    rank: int
    end: str
    """`FAILED`, `INTERRUPTED`, `PEER_FAILED` or `FINISHED`."""
    exit_code: int = 0
    message: str = ""
    traceback: str = ""
    step: int = 0
    stop_reason: str | None = None
    value: float | None = None
    """Return value of the job."""
    time: float = 0.0
    """Seconds since the epoch."""

    @classmethod
    def from_error(cls, error: BaseException, rank: int, progress: JobProgress) -> "ExitReport":
        """Return the report of a rank that ended with an error."""
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
        """Return the error to raise in the main process; its message names the rank unless `omit_rank`."""
        if self.end == INTERRUPTED:
            return InterruptedRun(self.exit_code - 128, self.message)
        message = self.message if omit_rank else f"process {self.rank}: {self.message}"
        return ERROR_CLASSES.get(self.exit_code, ProcessFailed)(message)


class ExitReportStore(Protocol):
    """A store of exit reports that all ranks share."""

    def put(self, report: ExitReport) -> None:
        """Store a report; it replaces an earlier report of the same rank."""

    def read(self) -> dict[int, ExitReport]:
        """Return the stored reports by rank."""


class FolderReportStore:
    """Exit reports in a folder that all ranks can access."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, report: ExitReport) -> None:
        """Store a report; it replaces an earlier report of the same rank."""
        replace_atomically(self.folder / f"exit_report-{report.rank}.json", encode_report(report))

    def read(self) -> dict[int, ExitReport]:
        """Return the stored reports by rank."""
        reports = [ExitReport(**json.loads(path.read_text())) for path in self.folder.glob("exit_report-*.json")]
        return {report.rank: report for report in reports}


def encode_report(report: ExitReport) -> bytes:
    """Return a report as JSON; a value that is not finite becomes null."""
    fields = asdict(report)
    try:
        return encode_json(fields)
    except ValueError:
        return encode_json(fields | {"value": None})


def root_cause(
    reports: Mapping[int, ExitReport], exit_codes: Mapping[int, int], received_signal: int | None
) -> ExitReport | None:
    """Return the report of the rank that ended a run; None if every rank finished.

    The order of precedence is: a rank that was killed, a rank that failed with its own error, an interruption, a rank
    that failed because of another rank. Within one kind, the earliest report counts; for interruptions, the report of
    the lowest rank, whose message names the saved checkpoint. A rank that was ended by SIGTERM comes after
    interruptions, because torch's launcher ends the remaining ranks with SIGTERM.

    Args:
        reports: exit reports by rank.
        exit_codes: exit codes by rank (negative for signals) of the processes that failed and that this launcher did
            not kill, in the order of their ends.
        received_signal: the signal that the run received, if any; it explains ranks without a report.
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
    """Return the kind of end for an error."""
    if isinstance(error, InterruptedRun):
        return INTERRUPTED
    if isinstance(error, OtherProcessFailed):
        return PEER_FAILED
    is_connection_error = isinstance(error, RuntimeError) and CONNECTION_ERROR.search(str(error)) is not None
    return PEER_FAILED if is_connection_error else FAILED
