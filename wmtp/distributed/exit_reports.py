"""How the processes of a run ended, and which of them was the cause."""

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
from wmtp.runtime.run_dir import Ending

FAILED, INTERRUPTED, SUFFERED, FINISHED = "failed", "interrupted", "suffered", "finished"
"""Ends: by its own error; by a signal; by the failure of another process; as planned."""
LOST_CONNECTION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out (after )?waiting|tcpstore", re.IGNORECASE
)
"""How torch.distributed tells that another process is gone; it has no class of errors for this in gloo."""
CLASSES: dict[int, type[WmtpError]] = {
    kind.exit_code: kind for kind in (InputError, PendingError, SandboxUnavailable)
}  # the others are told by their message alone


@dataclass(frozen=True)
class Outcome:
    """How one process ended; plain values, since it is written as JSON."""

    rank: int
    end: str
    exit_code: int = 0
    message: str = ""
    traceback: str = ""
    step: int = 0
    stop_reason: str | None = None
    value: float | None = None
    time: float = 0.0

    @classmethod
    def of(cls, error: BaseException, rank: int, ending: Ending) -> "Outcome":
        """That of a process which an error ended."""
        kind = "" if isinstance(error, (WmtpError, InterruptedRun)) else f"{type(error).__name__}: "
        return cls(
            rank,
            _end(error),
            getattr(error, "exit_code", 1) or 1,
            f"{kind}{error}",
            "".join(traceback.format_exception(error)),
            ending.step,
            ending.stop_reason,
            time=time.time(),
        )

    def error(self, alone: bool) -> BaseException:
        """The error to raise for it in the process that answers for all; if not `alone`, it names its process."""
        if self.end == INTERRUPTED:
            return InterruptedRun(self.exit_code - 128, self.message)
        message = self.message if alone else f"process {self.rank}: {self.message}"
        return CLASSES.get(self.exit_code, ProcessFailed)(message)


class Board(Protocol):
    """Where processes leave their outcomes."""

    def put(self, outcome: Outcome) -> None:
        """Leave an outcome, in the place of what this process left before."""

    def read(self) -> dict[int, Outcome]:
        """What was left so far, by rank."""


class FolderBoard:
    """A board in a folder that all processes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, outcome: Outcome) -> None:
        """Leave an outcome, in the place of what this process left before."""
        replace_atomically(self.folder / f"outcome-{outcome.rank}.json", encode(outcome))

    def read(self) -> dict[int, Outcome]:
        """What was left so far, by rank."""
        outcomes = [Outcome(**json.loads(path.read_text())) for path in self.folder.glob("outcome-*.json")]
        return {outcome.rank: outcome for outcome in outcomes}


def encode(outcome: Outcome) -> bytes:
    """An outcome as JSON; a value that is not finite is left out."""
    fields = asdict(outcome)
    try:
        return encode_json(fields)
    except ValueError:
        return encode_json(fields | {"value": None})


def cause(outcomes: Mapping[int, Outcome], deaths: Mapping[int, int], signalled: int | None) -> Outcome | None:
    """What ended a run; None if it ended as planned.

    Of several ends the first in this order: a process that was killed, one that failed by an error of its own, an
    interruption, a process that another's failure took along. Of the same kind, the earliest; for interruptions, the
    lowest rank, which knows what was saved.

    Args:
        deaths: exit codes, negative for signals, of the processes that nobody here killed, in their order.
        signalled: the signal that the run was sent, if it was; deaths are then its consequence.
    """
    killed = [
        Outcome(rank, FAILED, 1, _last_words(code))
        for rank, code in deaths.items()
        if code and rank not in outcomes and signalled is None
    ]
    by_launcher = [outcome for outcome in killed if -deaths[outcome.rank] == signal.SIGTERM]
    ends = sorted(outcomes.values(), key=lambda outcome: outcome.time)
    candidates = [outcome for outcome in killed if outcome not in by_launcher]
    candidates += [outcome for outcome in ends if outcome.end == FAILED]
    candidates += sorted((outcome for outcome in ends if outcome.end == INTERRUPTED), key=lambda outcome: outcome.rank)
    if signalled is not None and not candidates and any(o.end == SUFFERED for o in ends):
        return Outcome(0, INTERRUPTED, 128 + signalled, f"interrupted by {signal.Signals(signalled).name}")
    candidates += by_launcher + [outcome for outcome in ends if outcome.end == SUFFERED]
    return candidates[0] if candidates else None


def _last_words(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code} and left no word"
    return f"was ended by {signal.Signals(-code).name}"


def _end(error: BaseException) -> str:
    if isinstance(error, InterruptedRun):
        return INTERRUPTED
    if isinstance(error, OtherProcessFailed):
        return SUFFERED
    by_torch = isinstance(error, RuntimeError) and LOST_CONNECTION.search(str(error)) is not None
    return SUFFERED if by_torch else FAILED
