"""Two methods to start sandboxed processes: with a command for each process, or with a server that forks them."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from types import TracebackType

from wmtp.sandbox.mounts import ENVIRONMENT
from wmtp.sandbox.process import EXIT_CODE, EXIT_TIMEOUT_S, KILLED, Process, SandboxFailure


class SpawnedProcess(Process):
    """A process that a command of its own starts."""

    def __init__(
        self, command_for: Callable[[int, int, int], list[str]], program: bytes, stdin: bytes | None = None
    ) -> None:
        """Start a command.

        Args:
            command_for: function that returns the command line. Its arguments are three file descriptors: that of the
                program, and two for status messages. init.py writes to the first one, and the program that creates the
                namespaces writes to the second one.
            program: see `Process`.
            stdin: see `Process`.
        """
        self._command_for = command_for
        super().__init__(program, stdin)

    def _start(self, descriptors: list[int]) -> None:
        program, stdin, stdout, stderr, status = descriptors
        namespace_fd = os.dup(status)  # a second descriptor, because bubblewrap closes its own
        try:
            self._popen = subprocess.Popen(
                self._command_for(program, status, namespace_fd), stdin=stdin, stdout=stdout, stderr=stderr,
                pass_fds=(program, status, namespace_fd), env=ENVIRONMENT, cwd="/", start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(namespace_fd)

    def exit_code(self, seconds: float) -> int | None:
        """Wait up to `seconds` for the process to end, and return its exit code (see `Process`)."""
        try:
            code = self._popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def _kill(self) -> None:
        if self._init_pidfd is None or not self.has_exited:  # the pid of an exited process may have been reused
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


class ForkServer:
    """A process that executes init.py and forks a sandboxed process for each request."""

    def __init__(self, command_for: Callable[[int], list[str]]) -> None:
        """Start the server.

        Args:
            command_for: function that returns the command line. Its argument is the file descriptor of the socket.

        Raises:
            SandboxFailure: the machine cannot start more processes.
        """
        self._socket, control = socket.socketpair()
        try:
            self._popen = subprocess.Popen(
                command_for(control.fileno()), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, pass_fds=[control.fileno()], env=ENVIRONMENT, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._socket.close()
            raise SandboxFailure(f"no process could be started: {error}") from error
        finally:
            control.close()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._popen.kill()
        self._popen.wait()

    def start(self, program: bytes, stdin: bytes | None = None) -> "ForkedProcess":
        """Start a process (see `Process`). It must be killed before the server ends."""
        return ForkedProcess(self._socket, program, stdin)


class ForkedProcess(Process):
    """A process that a `ForkServer` starts. The parent of its namespaces writes its exit code to the status pipe."""

    def __init__(self, server: socket.socket, program: bytes, stdin: bytes | None = None) -> None:
        self._server = server
        super().__init__(program, stdin)

    def _start(self, descriptors: list[int]) -> None:
        socket.send_fds(self._server, [b"."], descriptors)

    def exit_code(self, seconds: float) -> int | None:
        """Wait up to `seconds` for the process to end, and return its exit code (see `Process`)."""
        deadline = time.monotonic() + seconds
        while (received := self._read_status(deadline - time.monotonic())) != b"":
            if received is None:
                return None
        found = EXIT_CODE.search(self._report)
        return int(found[1]) if found else KILLED

    def _kill(self) -> None:
        if self._init_pidfd is not None:  # otherwise, its parent has ended, or it ends with the server
            self.exit_code(EXIT_TIMEOUT_S)
