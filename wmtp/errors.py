"""What can go wrong for a user: one class per exit code of the commands."""

from collections.abc import Iterable

SEVERITY = (0, 3, 2, 4, 1)
"""Exit codes, the mildest first: done, not delivered, wrong input, no sandbox, failed; above 128 interruptions."""


def worst(exit_codes: Iterable[int]) -> int:
    """The exit code of a command with several jobs.

    >>> worst([0, 3, 1]), worst([2, 3]), worst([1, 137]), worst([])
    (1, 2, 137, 0)
    """
    return max(
        exit_codes, key=lambda code: (SEVERITY.index(code) if code in SEVERITY else len(SEVERITY), code), default=0
    )


class WmtpError(Exception):
    """A failure that is reported by its message, without a traceback."""

    exit_code = 1


class InputError(WmtpError):
    """The config or an input is wrong; nothing was trained."""

    exit_code = 2


class TrainingError(WmtpError):
    """Training cannot go on: a loss, gradient or weight is not finite."""

    exit_code = 1


class PendingError(WmtpError):
    """Training is done, but tracking data are still on disk only."""

    exit_code = 3


class SandboxUnavailable(WmtpError):
    """Programs cannot be run safely here, or could not be judged."""

    exit_code = 4


class InterruptedRun(BaseException):
    """A signal ended the run; the exit code is 128 plus its number.

    Like KeyboardInterrupt no `Exception`, so that nothing that handles errors takes it for one.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.exit_code - 128, str(self))


class InterruptedAtOnce(InterruptedRun):
    """A signal ended the run wherever it was: what was not saved before is lost."""


class ProcessFailed(WmtpError):
    """One of the processes of a run failed or died. Its traceback, if it left one, is in the log."""
