"""One process in a sandbox: its pipes, its end, and waiting for what comes out of several of them."""

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
START_SECONDS = 60.0
"""How long a sandbox may take to be ready: a machine that is busy is no fault of the program's."""
END_SECONDS = 30.0
INIT = re.compile(rb'"child-pid": *(\d+)[^}]*}')


class SandboxFailure(Exception):
    """A sandbox did not come about or broke down: not the program's doing."""


class Process:
    """A process with pipes. As a context manager it leaves nothing alive.

    `inbox` holds what has come from standard output, `noise` from standard error; whoever reads looks after
    their sizes after each turn. `ended` says that all has come: standard output is closed, or a turn brought nothing
    though the process was over before it, and others keep its pipes open.
    """

    def __init__(self, command_for: Callable[[int, int], list[str]]) -> None:
        """Start the command, told the descriptors by which the launcher and whoever makes the namespaces report.

        Raises:
            SandboxFailure: the machine starts no more processes, or the command is not there.
        """
        self.inbox = bytearray()
        self.noise = bytearray()
        self.ended = False
        self.num_received = 0
        self._outbox = memoryview(b"")
        self._init: int | None = None
        reading, launcher = os.pipe()
        self._status = os.fdopen(reading, "rb", buffering=0)
        maker = os.dup(launcher)  # two, since bubblewrap closes its own
        try:
            self._popen = subprocess.Popen(
                command_for(launcher, maker), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=(launcher, maker), env=ENVIRONMENT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._status.close()
            raise SandboxFailure(f"no process could be started: {error}") from error
        finally:
            os.close(launcher)
            os.close(maker)
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
        """The writing end of its standard input."""
        assert self._popen.stdin
        return self._popen.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """The reading end of its standard output."""
        assert self._popen.stdout
        return self._popen.stdout

    @property
    def stderr(self) -> IO[bytes]:
        """The reading end of its standard error."""
        assert self._popen.stderr
        return self._popen.stderr

    def wait_until_ready(self) -> None:
        """Wait for the launcher's word that isolation and limits stand.

        Raises:
            SandboxFailure: it says otherwise, or nothing in time.
        """
        report = b""
        deadline = time.monotonic() + START_SECONDS
        with self._status as pipe:
            while not report.endswith(b"."):
                ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                received = pipe.read(CHUNK) if ready else b""
                if self._init is None and (found := INIT.search(report + received)):
                    self._init = _open_process(int(found[1]))
                if not received:
                    self._read(self.stderr, self.noise)
                    said = INIT.sub(b"", report).strip(b"{ \n") or bytes(self.noise).strip() or b"no answer"
                    raise SandboxFailure(f"not isolated: {said.decode(errors='replace')}")
                report += received

    def send(self, data: bytes) -> None:
        """Add to what waits to be written to its standard input."""
        self._outbox = memoryview(bytes(self._outbox) + data)

    def close_input(self) -> None:
        """End its standard input."""
        with contextlib.suppress(OSError):
            self.stdin.close()

    def exit_code(self, seconds: float) -> int | None:
        """Its exit code, 128 plus the signal's number where a signal ended it; None if it runs on for so long."""
        try:
            code = self._popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    @property
    def is_over(self) -> bool:
        """Whether the process has ended, even if others keep its pipes open."""
        return self._popen.poll() is not None

    def kill(self) -> None:
        """End it and all that it started, and wait until they are gone."""
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
        if self._init is None or not self.is_over:  # a number that is free again may belong to others
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        if self._init is not None:
            select.select([self._init], [], [], END_SECONDS)
            os.close(self._init)
            self._init = None
        for pipe in (self.stdin, self.stdout, self.stderr, self._status):
            with contextlib.suppress(OSError):
                pipe.close()

    def read(self, pipe: IO[bytes]) -> bool:
        """Take in at most `CHUNK` of what is in a pipe; whether it is still open."""
        into = self.inbox if pipe is self.stdout else self.noise
        held = len(into)
        is_open = self._read(pipe, into)
        self.num_received += len(into) - held
        if pipe is self.stdout and not is_open:
            self.ended = True
        return is_open

    def write(self) -> bool:
        """Write as much of what waits as the pipe takes; whether some is left."""
        try:
            self._outbox = self._outbox[os.write(self.stdin.fileno(), self._outbox[:CHUNK]) :]
        except BlockingIOError:
            pass
        except OSError:  # it reads no more
            self._outbox = memoryview(b"")
        return self.has_waiting

    @property
    def has_waiting(self) -> bool:
        """Whether something waits to be written."""
        return len(self._outbox) > 0

    @staticmethod
    def _read(pipe: IO[bytes], into: bytearray) -> bool:
        try:
            received = os.read(pipe.fileno(), CHUNK)
        except BlockingIOError:
            return True
        into += received
        return bool(received)


class Exchange:
    """Moves bytes between this process and several sandboxed ones."""

    TURN_SECONDS = 0.05

    def __init__(self, *processes: Process) -> None:
        self._selector = selectors.DefaultSelector()
        self._processes = processes
        for process in processes:
            self._selector.register(process.stdout, selectors.EVENT_READ, process)
            self._selector.register(process.stderr, selectors.EVENT_READ, process)

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()

    def turns(self, deadline: float) -> Iterator[None]:
        """Write and read what is possible, once for each step, until the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            for process in self._processes:
                if process.has_waiting and process.stdin.fileno() not in self._selector.get_map():
                    self._selector.register(process.stdin, selectors.EVENT_WRITE, process)
            before = {process: process.num_received for process in self._processes if process.is_over}
            for key, _ in self._selector.select(min(left, self.TURN_SECONDS)):
                process = key.data
                goes_on = process.write() if key.fileobj is process.stdin else process.read(key.fileobj)
                if not goes_on:
                    self._selector.unregister(key.fileobj)
            for process, num_received in before.items():
                process.ended |= process.num_received == num_received
            yield


def _open_process(number: int) -> int | None:
    """A descriptor of a process, or None where it has ended already."""
    try:
        return os.pidfd_open(number)
    except ProcessLookupError:
        return None
