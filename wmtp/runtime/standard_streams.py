"""Standard output and standard error of a command. A command continues if they can no longer be written.

A terminal disappears when its window is closed or its connection is lost, and a pipe breaks when its reader ends.
"""

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from wmtp.errors import WmtpError

log = logging.getLogger(__name__)
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


class ConsoleFile(io.FileIO):
    """A file descriptor for output whose methods raise no error if the output is lost."""

    lost: OSError | None = None
    """The first error of a write. After it, output is still written if that is possible again."""
    is_logged = False

    def write(self, data: Any) -> int:
        """Write data, or note in the log that this is not possible. Return the number of bytes that are done with."""
        try:
            while (count := super().write(data)) is None:  # the descriptor does not block, and its buffer is full
                select.select([], [self], [])
        except OSError as error:
            self.lost = self.lost or error
            if not self.is_logged and log.isEnabledFor(logging.INFO):  # otherwise the log file is not open yet
                self.is_logged = True
                name = "standard output" if self.fileno() == STANDARD_OUTPUT else "standard error"
                log.info("%s is lost (%s); the command continues without it", name, error.strerror)
            return memoryview(data).nbytes
        return count


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` with streams whose writes raise no error while the context is active.

    Characters that the encoding does not contain are written as escape sequences. Standard streams that are closed are
    opened on /dev/null. Otherwise, the next file that is opened would get the number of such a stream, and libraries
    would write their messages to it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(before[0], STANDARD_OUTPUT), _lasting(before[1], STANDARD_ERROR)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream that writes to the same file. A stream that is not a file is returned unchanged."""
    encoding, errors, line_buffering = "utf-8", "strict", False
    if stream is not None:
        raw = _raw_file(stream)
        if not isinstance(raw, io.FileIO):
            return stream
        with suppress(OSError):
            stream.flush()
        encoding, errors, descriptor = stream.encoding, stream.errors or errors, raw.fileno()
        line_buffering = bool(stream.line_buffering or getattr(stream, "write_through", False))
    file = io.BufferedWriter(ConsoleFile(descriptor, "w", closefd=False))
    errors = "backslashreplace" if errors == "strict" else errors
    if not file.isatty():
        return io.TextIOWrapper(file, encoding, errors, line_buffering=line_buffering)
    from wmtp.runtime.console import TerminalText  # imports rich, which takes a tenth of a second

    return TerminalText(file, encoding, errors, line_buffering=line_buffering)


def _raw_file(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)  # with PYTHONUNBUFFERED, it is the raw file itself
    return getattr(buffer, "raw", buffer)


def announce(text: str) -> None:
    """Write to a terminal what the command does next. If standard error is not a terminal, nothing is written."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def notify(text: str) -> None:
    """Write a line to standard error. A signal handler can call this, even if the signal has interrupted a write."""
    try:
        print(text, file=sys.stderr, flush=True)
    except RuntimeError:
        write_error(text)


def write_error(text: str) -> None:
    """Write a line to standard error of this process, even if `sys.stderr` is another file."""
    with suppress(OSError):
        os.write(STANDARD_ERROR, f"{text}\n".encode())


def require_written_output() -> None:
    """Check that standard output was written. Commands call this whose result is their output.

    A reader that has ended is no error: it has read all that it needed, for example in `… --help | head`.

    Raises:
        WmtpError: standard output could not be written.
    """
    sys.stdout.flush()
    file = _raw_file(sys.stdout)
    if isinstance(file, ConsoleFile) and file.lost is not None and file.lost.errno != errno.EPIPE:
        raise WmtpError(f"standard output cannot be written: {file.lost.strerror}")
