"""Exceptions that commands report to users, and the exit codes of the commands."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SEVERITY = (0, 3, 2, 4, 1)
"""Exit codes in order of increasing severity. They mean success, pending uploads, wrong input, a missing sandbox, and
failure. Codes above 128, which mean an interruption, are more severe than all of these."""


def worst_exit_code(exit_codes: Iterable[int]) -> int:
    """Return the most severe of the given exit codes, or 0 if there are none.

    >>> worst_exit_code([0, 3, 1]), worst_exit_code([2, 3]), worst_exit_code([1, 137]), worst_exit_code([])
    (1, 2, 137, 0)
    """
    return max(
        exit_codes, key=lambda code: (SEVERITY.index(code) if code in SEVERITY else len(SEVERITY), code), default=0
    )


class WmtpError(Exception):
    """An error whose message is shown to the user without a traceback."""

    exit_code = 1


class InputError(WmtpError):
    """An error in the config or in another input of a command."""

    exit_code = 2


@contextmanager
def refuse_odd_content(where: object) -> Iterator[None]:
    """Raise an `InputError` if the files at `where`, which a stranger may have written, have an unexpected content."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: its files are damaged or changed: {type(error).__name__}: {error}") from error


class TrainingError(WmtpError):
    """An error that ends a training, for example because the loss is not finite."""

    exit_code = 1


class PendingError(WmtpError):
    """An incomplete upload at the end of a job that is otherwise complete. The data stay on the local disk."""

    exit_code = 3


class SandboxUnavailable(WmtpError):
    """A failure of the sandbox. Programs cannot run safely on this machine, or some programs could not be graded."""

    exit_code = 4


class InterruptedRun(BaseException):
    """The interruption of a run by a signal. The exit code is 128 plus the signal number.

    This class is not a subclass of `Exception`, so `except Exception` does not catch it.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.exit_code - 128, str(self))


class InterruptedAtOnce(InterruptedRun):
    """The interruption of a run by a signal, without saving a checkpoint."""


class ProcessFailed(WmtpError):
    """The failure of one process of a run. If the process wrote a traceback, the traceback is in the log."""
