"""Sandboxed processes, and a loop that transfers data between the current process and sandboxed processes."""

import contextlib
import os
import re
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO

from wmtp.sandbox.mounts import ENVIRONMENT

CHUNK = 64 * 1024
"""Maximum number of bytes that are read from a pipe or written to a pipe at once."""
START_TIMEOUT_S = 60.0
"""Maximum number of seconds until a sandbox is ready. The limit is generous, because the machine may be busy."""
EXIT_TIMEOUT_S = 30.0
"""Maximum number of seconds to wait for the exit of a process that was killed or that closed its output."""
CHILD_PID = re.compile(rb'"child-pid": *(\d+)[^}]*}')
"""Pattern of the message in which bubblewrap or init.py reports the pid of the first process in the namespaces."""


class SandboxFailure(Exception):
    """Error of the sandbox, not of the program: it could not be created, or it failed later."""


class Process:
    """A sandboxed process with pipes. At the end of a `with` statement, it is killed together with all its descendants.

    `stdout_data` and `stderr_data` collect the output. The caller must check their sizes after each step of the
    `PipeLoop`. `output_ended` becomes True when all output has been received, which has two possible causes. Either
    standard output was closed, or the process had already exited and no data arrived in a step. In the second case,
    only other processes keep the pipes open.
    """

    def __init__(self, command_for: Callable[[int, int], list[str]]) -> None:
        """Start a command.

        Args:
            command_for: function that returns the command line. Its arguments are two file descriptors for status
                messages. init.py writes to the first one, and the program that creates the namespaces writes to the
                second one.

        Raises:
            SandboxFailure: the machine cannot start more processes, or the command does not exist.
        """
        self.stdout_data = bytearray()
        self.stderr_data = bytearray()
        self.output_ended = False
        self.num_received = 0
        self._pending_input = memoryview(b"")
        self._init_pidfd: int | None = None
        reading, init_fd = os.pipe()
        self._status = os.fdopen(reading, "rb", buffering=0)
        namespace_fd = os.dup(init_fd)  # a second descriptor, because bubblewrap closes its own
        try:
            self._popen = subprocess.Popen(
                command_for(init_fd, namespace_fd),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=(init_fd, namespace_fd), env=ENVIRONMENT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._status.close()
            raise SandboxFailure(f"no process could be started: {error}") from error
        finally:
            os.close(init_fd)
            os.close(namespace_fd)
        for pipe in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(pipe.fileno(), False)

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe to the standard input of the process."""
        assert self._popen.stdin
        return self._popen.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """The pipe from the standard output of the process."""
        assert self._popen.stdout
        return self._popen.stdout

    @property
    def stderr(self) -> IO[bytes]:
        """The pipe from the standard error of the process."""
        assert self._popen.stderr
        return self._popen.stderr

    def wait_until_ready(self) -> None:
        """Wait until init.py reports that the isolation and the limits are in force.

        Raises:
            SandboxFailure: init.py reports an error, or it reports nothing within `START_TIMEOUT_S` seconds.
        """
        report = b""
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._status as pipe:
            while not report.endswith(b"."):
                ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                received = pipe.read(CHUNK) if ready else b""
                if self._init_pidfd is None and (found := CHILD_PID.search(report + received)):
                    self._init_pidfd = _open_process(int(found[1]))
                if not received:
                    self._read(self.stderr, self.stderr_data)
                    message = CHILD_PID.sub(b"", report).strip(b"{ \n") or bytes(self.stderr_data).strip()
                    raise SandboxFailure(f"not isolated: {(message or b'no answer').decode(errors='replace')}")
                report += received

    def send(self, data: bytes) -> None:
        """Append data to the pending input of the process. The `PipeLoop` writes the pending input to the process."""
        self._pending_input = memoryview(bytes(self._pending_input) + data)

    def close_input(self) -> None:
        """Close the standard input of the process."""
        with contextlib.suppress(OSError):
            self.stdin.close()

    def exit_code(self, seconds: float) -> int | None:
        """Wait up to `seconds` for the process to end, and return its exit code.

        The result is None if the process still runs. If a signal killed the process, the exit code is 128 plus the
        number of the signal.
        """
        try:
            code = self._popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    @property
    def has_exited(self) -> bool:
        """True if the process has exited, even if other processes keep its pipes open."""
        return self._popen.poll() is not None

    def kill(self) -> None:
        """Kill the process and all its descendants, and wait until they have ended."""
        if self._init_pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        if self._init_pidfd is None or not self.has_exited:  # the pid of an exited process may have been reused
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        if self._init_pidfd is not None:
            select.select([self._init_pidfd], [], [], EXIT_TIMEOUT_S)
            os.close(self._init_pidfd)
            self._init_pidfd = None
        for pipe in (self.stdin, self.stdout, self.stderr, self._status):
            with contextlib.suppress(OSError):
                pipe.close()

    def read(self, pipe: IO[bytes]) -> bool:
        """Read at most `CHUNK` bytes of output from a pipe, and return whether the pipe is still open."""
        buffer = self.stdout_data if pipe is self.stdout else self.stderr_data
        before = len(buffer)
        is_open = self._read(pipe, buffer)
        self.num_received += len(buffer) - before
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
                is_active = process.write() if key.fileobj is process.stdin else process.read(key.fileobj)
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
