"""Errors that users can cause or must handle: one class per exit code of the commands."""

from collections.abc import Iterable

SEVERITY = (0, 3, 2, 4, 1)
"""Exit codes from mild to severe: success, uploads pending, wrong input, no sandbox, failure. Codes above 128
(interruptions) are more severe."""


def worst_exit_code(exit_codes: Iterable[int]) -> int:
    """Return the exit code of a command with several jobs.

    >>> worst_exit_code([0, 3, 1]), worst_exit_code([2, 3]), worst_exit_code([1, 137]), worst_exit_code([])
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
    """Training cannot continue: a loss, gradient or weight is not finite."""

    exit_code = 1


class PendingError(WmtpError):
    """Training is complete, but some uploads are pending; the data are on the local disk."""

    exit_code = 3


class SandboxUnavailable(WmtpError):
    """Programs cannot be run safely on this machine, or could not be graded."""

    exit_code = 4


class InterruptedRun(BaseException):
    """A signal ended the run; the exit code is 128 plus the signal number.

    Not an `Exception` (like KeyboardInterrupt), so that error handlers do not catch it.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.exit_code - 128, str(self))


class InterruptedAtOnce(InterruptedRun):
    """A signal ended the run immediately, without a checkpoint."""


class ProcessFailed(WmtpError):
    """One of the processes of a run failed or died. Its traceback, if any, is in the log."""
