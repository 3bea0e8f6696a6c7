"""Record how each rank of a run ended, and find the root cause of the run's end."""

import json
import re
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from wmtp.distributed.process_group import OtherProcessFailed
from wmtp.errors import (
    InputError,
    InterruptedRun,
    PendingError,
    ProcessFailed,
    SandboxUnavailable,
    WmtpError,
)

DIED, FAILED, INTERRUPTED, PEER_FAILED, FINISHED = "died", "failed", "interrupted", "peer_failed", "finished"
"""Ways in which a rank can end: without a report, by its own error, by a signal, because another rank failed, or with
success."""
PRIORITY = {DIED: 0, FAILED: 1, INTERRUPTED: 2, PEER_FAILED: 3}
"""Order in which the ends of ranks are considered as the root cause of the end of a run."""
CONNECTION_ERROR = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out (after )?waiting|wait timeout|tcpstore",
    re.IGNORECASE,
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
    """How the rank ended, one of the ways above."""
    exit_code: int = 0
    message: str = ""
    traceback: str = ""
    time: float = 0.0
    """Time at which the rank ended, in seconds since 1970 (`time.time`)."""

    @classmethod
    def from_error(cls, error: BaseException, rank: int) -> "ExitReport":
        """Return the report of a rank that ended with the given error."""
        kind = "" if isinstance(error, (WmtpError, InterruptedRun)) else f"{type(error).__name__}: "
        return cls(
            rank,
            _classify(error),
            getattr(error, "exit_code", 1) or 1,
            f"{kind}{error}",
            "".join(traceback.format_exception(error)),
            time.time(),
        )

    @classmethod
    def from_exit_code(cls, rank: int, code: int) -> "ExitReport":
        """Return the report of a rank whose process ended without writing one. A negative code is a signal's number."""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return cls(rank, DIED, 1, how)

    def error(self) -> BaseException:
        """Return the error that rank 0 raises. Its message names the rank, unless it is rank 0 itself."""
        if self.end == INTERRUPTED:
            return InterruptedRun(self.exit_code - 128, self.message)
        message = f"process {self.rank}: {self.message}" if self.rank else self.message
        return ERROR_CLASSES.get(self.exit_code, ProcessFailed)(message)


class ExitReports:
    """The exit reports of all ranks, in the key-value store that the ranks share."""

    def __init__(self, store: Store, size: int) -> None:
        self._store, self._size = store, size

    def put(self, report: ExitReport) -> None:
        """Store the report of a rank. It replaces an earlier report of the same rank."""
        self._store.set(f"exit_report/{report.rank}", json.dumps(asdict(report)))

    def read(self) -> dict[int, ExitReport]:
        """Return all stored reports, by rank."""
        keys = {rank: f"exit_report/{rank}" for rank in range(self._size)}
        return {
            rank: ExitReport(**json.loads(self._store.get(key)))
            for rank, key in keys.items()
            if self._store.check([key])
        }


def root_cause(reports: Mapping[int, ExitReport], exit_codes: Mapping[int, int]) -> ExitReport | None:
    """Return the report of the rank that caused the end of a run, or None if no rank failed.

    The way in which the rank ended has the highest priority in `PRIORITY`. If there are several such ranks, the one
    that ended first is selected. Among interrupted ranks, however, the lowest rank is selected, because its message
    contains the path of the saved checkpoint. If a rank was interrupted, a rank without a report is no cause, because
    the signal may have ended it.

    Args:
        reports: exit reports by rank.
        exit_codes: exit codes of processes that have ended, by rank. A negative code is the number of a signal.
    """
    ends = [report for report in reports.values() if report.end != FINISHED]
    if not any(report.end == INTERRUPTED for report in ends):
        ends += [ExitReport.from_exit_code(rank, code) for rank, code in exit_codes.items() if rank not in reports]
    return min(
        ends,
        key=lambda report: (PRIORITY[report.end], 0.0 if report.end == INTERRUPTED else report.time, report.rank),
        default=None,
    )


def _classify(error: BaseException) -> str:
    """Return `INTERRUPTED`, `PEER_FAILED` or `FAILED`, depending on the error that ended a rank."""
    if isinstance(error, InterruptedRun):
        return INTERRUPTED
    if isinstance(error, OtherProcessFailed):
        return PEER_FAILED
    is_connection_error = isinstance(error, RuntimeError) and CONNECTION_ERROR.search(str(error)) is not None
    return PEER_FAILED if is_connection_error else FAILED
