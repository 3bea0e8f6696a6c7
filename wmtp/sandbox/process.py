"""Sandboxed processes, and a loop that transfers data between the current process and sandboxed processes."""

import contextlib
import fcntl
import os
import re
import select
import selectors
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import IO

CHUNK = 64 * 1024
"""Maximum number of bytes that are read from a pipe or written to a pipe at once."""
MAX_STDERR = 64 * 1024
"""Maximum number of bytes of standard error that are kept. Programs may write more, because nobody judges it."""
START_TIMEOUT_S = 60.0
"""Maximum number of seconds until a sandbox is ready. The limit is generous, because the machine may be busy."""
EXIT_TIMEOUT_S = 30.0
"""Maximum number of seconds to wait for the exit of a process that was killed or that closed its output."""
CHILD_PID = re.compile(rb'"child-pid": *(\d+)[^}]*}')
"""Pattern of the message in which bubblewrap or init.py reports the pid of the first process in the namespaces."""
EXIT_CODE = re.compile(rb"\n(\d+)$")
"""Pattern of the message in which init.py reports the exit code of a forked process."""
SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE, after which no process can change a file in memory."""
ADD_SEALS = 1033
"""Number of the command F_ADD_SEALS. The module `fcntl` has these constants only on Linux."""
KILLED = 128 + signal.SIGKILL
"""Exit code of a process that the signal SIGKILL ended."""


class SandboxFailure(Exception):
    """Error of the sandbox, not of the program: it could not be created, or it failed later."""


def read_only_file(content: bytes) -> int:
    """Return a file descriptor from which `content` can be read, as from a regular file.

    The file exists only in memory and has no name. No process can change it, not even by opening it again. On systems
    without such files, the result is a temporary file that has been removed.
    """
    try:
        descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            return os.open(file.name, os.O_RDONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        fcntl.fcntl(file, ADD_SEALS, SEALS)
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)


class Process(ABC):
    """A sandboxed process with pipes. At the end of a `with` statement, it is killed together with all its descendants.

    `stdout_data` and `stderr_data` collect the output. The caller must check the size of `stdout_data` after each step
    of the `PipeLoop`. `output_ended` becomes True when all output has been received, which has two possible causes.
    Either standard output was closed, or the process had already exited and no data arrived in a step. In the second
    case, only other processes keep the pipes open.
    """

    def __init__(self, program: bytes, stdin: bytes | None = None) -> None:
        """Start a program.

        Args:
            program: the program, as init.py reads it.
            stdin: the content of its standard input, which is then a regular file. If it is None, the standard input
                is a pipe.

        Raises:
            SandboxFailure: the machine cannot start more processes, or the sandbox's own program does not exist.
        """
        self.stdout_data = bytearray()
        self.stderr_data = bytearray()
        self.output_ended = False
        self.num_received = 0
        self._pending_input = memoryview(b"")
        self._report = b""
        self._init_pidfd: int | None = None
        self._pipes: list[IO[bytes]] = []
        self._stdin: IO[bytes] | None = None
        descriptors = []
        try:
            descriptors.append(read_only_file(program))
            if stdin is None:
                self._stdin = self._pipe_to(descriptors)
            else:
                descriptors.append(read_only_file(stdin))
            self.stdout, self.stderr, self._status = (self._pipe_from(descriptors) for _ in range(3))
            self._start(descriptors)
        except OSError as error:
            self._close_pipes()
            raise SandboxFailure(f"no process could be started: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _pipe_to(self, descriptors: list[int]) -> IO[bytes]:
        """Append the reading end of a new pipe to `descriptors`, and return the writing end."""
        reading, writing = os.pipe()
        descriptors.append(reading)
        return self._own_end(writing, "wb")

    def _pipe_from(self, descriptors: list[int]) -> IO[bytes]:
        """Append the writing end of a new pipe to `descriptors`, and return the reading end."""
        reading, writing = os.pipe()
        descriptors.append(writing)
        return self._own_end(reading, "rb")

    def _own_end(self, descriptor: int, mode: str) -> IO[bytes]:
        os.set_blocking(descriptor, False)
        self._pipes.append(os.fdopen(descriptor, mode, 0))
        return self._pipes[-1]

    @abstractmethod
    def _start(self, descriptors: list[int]) -> None:
        """Start init.py with the descriptors of the program, its standard input, output and error, and its status."""

    @abstractmethod
    def exit_code(self, seconds: float) -> int | None:
        """Wait up to `seconds` for the process to end, and return its exit code.

        The result is None if the process still runs. If a signal killed the process, the exit code is 128 plus the
        number of the signal.
        """

    @abstractmethod
    def _kill(self) -> None:
        """Kill the processes that remain after the first process in the namespaces was killed, and wait for them."""

    def __enter__(self) -> "Process":
        return self

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe to the standard input of the process."""
        assert self._stdin
        return self._stdin

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait_until_ready(self) -> None:
        """Wait until init.py reports that the isolation and the limits are in force.

        Raises:
            SandboxFailure: init.py reports an error, or it reports nothing within `START_TIMEOUT_S` seconds.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"\0" not in self._report:
            received = self._read_status(deadline - time.monotonic())
            if self._init_pidfd is None and (found := CHILD_PID.search(self._report)):
                self._init_pidfd = _open_process(int(found[1]))
            if not received:
                self._read(self.stderr, self.stderr_data)
                report = EXIT_CODE.sub(b"", CHILD_PID.sub(b"", self._report))
                message = report.strip(b"{ \n") or bytes(self.stderr_data).strip()
                raise SandboxFailure(f"not isolated: {(message or b'no answer').decode(errors='replace')}")

    def _read_status(self, seconds: float) -> bytes | None:
        """Append what init.py writes to the report, and return it.

        The result is b"" if the status pipe has been closed, and None if nothing was written within `seconds`.
        """
        ready, _, _ = select.select([self._status], [], [], max(0.0, seconds))
        received = os.read(self._status.fileno(), CHUNK) if ready else None
        self._report += received or b""
        return received

    def send(self, data: bytes) -> None:
        """Append data to the pending input of the process. The `PipeLoop` writes the pending input to the process."""
        self._pending_input = memoryview(bytes(self._pending_input) + data)

    @property
    def has_exited(self) -> bool:
        """True if the process has exited, even if other processes keep its pipes open."""
        return self.exit_code(0) is not None

    def kill(self) -> None:
        """Kill the process and all its descendants, and wait until they have ended."""
        if self._init_pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        self._kill()
        if self._init_pidfd is not None:
            select.select([self._init_pidfd], [], [], EXIT_TIMEOUT_S)
            os.close(self._init_pidfd)
            self._init_pidfd = None
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()

    def read(self, pipe: IO[bytes]) -> bool:
        """Read at most `CHUNK` bytes of output from a pipe, and return whether the pipe is still open.

        Of standard error, only the last `MAX_STDERR` bytes are kept.
        """
        buffer = self.stdout_data if pipe is self.stdout else self.stderr_data
        before = len(buffer)
        is_open = self._read(pipe, buffer)
        self.num_received += len(buffer) - before
        del self.stderr_data[:-MAX_STDERR]
        if pipe is self.stdout and not is_open:
            self.output_ended = True
        return is_open

    def write(self) -> bool:
        """Write as much of the pending input as the pipe accepts, and return whether any input is still pending."""
        try:
            self._pending_input = self._pending_input[os.write(self.stdin.fileno(), self._pending_input[:CHUNK]) :]
        except BlockingIOError:
            pass
        except OSError:  # the process has closed its standard input
            self._pending_input = memoryview(b"")
        return self.has_pending_input

    @property
    def has_pending_input(self) -> bool:
        """True if some input has not been written yet."""
        return len(self._pending_input) > 0

    @staticmethod
    def _read(pipe: IO[bytes], buffer: bytearray) -> bool:
        try:
            received = os.read(pipe.fileno(), CHUNK)
        except BlockingIOError:
            return True
        buffer += received
        return bool(received)


class PipeLoop:
    """An event loop that transfers data between the current process and several sandboxed processes."""

    STEP_SECONDS = 0.05

    def __init__(self, *processes: Process) -> None:
        self._selector = selectors.DefaultSelector()
        self._processes = processes
        for process in processes:
            self._selector.register(process.stdout, selectors.EVENT_READ, process)
            self._selector.register(process.stderr, selectors.EVENT_READ, process)

    def __enter__(self) -> "PipeLoop":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()

    def steps(self, deadline: float) -> Iterator[None]:
        """Transfer data in steps until the deadline, and yield after each step.

        In each step, every pipe that is ready is read or written once. The deadline is a value of `time.monotonic`.
        """
        while (remaining := deadline - time.monotonic()) > 0:
            for process in self._processes:
                if process.has_pending_input and process.stdin.fileno() not in self._selector.get_map():
                    self._selector.register(process.stdin, selectors.EVENT_WRITE, process)
            before = {process: process.num_received for process in self._processes if process.has_exited}
            for key, _ in self._selector.select(min(remaining, self.STEP_SECONDS)):
                process = key.data
                is_active = process.write() if key.fileobj is process._stdin else process.read(key.fileobj)
                if not is_active:
                    self._selector.unregister(key.fileobj)
            for process, num_received in before.items():
                process.output_ended |= process.num_received == num_received
            yield


def _open_process(pid: int) -> int | None:
    """Return a file descriptor that refers to a process (a pidfd), or None if the process has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
