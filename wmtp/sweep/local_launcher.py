"""Run the jobs of a sweep as processes on this machine. Several jobs can run at the same time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from wmtp.errors import InterruptedRun
from wmtp.runtime.processes import CORES_VARIABLE, PARENT_VARIABLE, num_cores
from wmtp.runtime.signals import SIGNALS
from wmtp.runtime.standard_streams import notify

STDERR_LINES = 60
"""Number of lines that are kept from the end of each job's standard error."""
POLL_INTERVAL_S = 0.1
OnStart = Callable[[int], None]
"""Callback that receives the number of a job that starts."""
OnEnd = Callable[[int, int, str], None]
"""Callback that receives the number of an ended job, its exit code, and the last lines of its standard error."""


def run_local(
    commands: Mapping[int, list[str]], consoles: Mapping[int, Path], num_parallel: int, on_start: OnStart, on_end: OnEnd
) -> None:
    """Run the commands of jobs. Each running job may use an equal share of the cores.

    If a signal interrupts this process, the signal is forwarded to the running jobs. The function waits until they have
    ended, and starts no other job.

    Args:
        commands: command line of each job, by job number.
        consoles: file for the output of each job, by job number. The other jobs write to the output of this process.
        num_parallel: maximum number of jobs that run at the same time.
        on_start: called before a job starts.
        on_end: called after a job has ended.

    Raises:
        InterruptedRun: a signal was received, and all running jobs have ended.
    """
    cores = max(1, num_cores() // num_parallel)
    waiting, running, started = deque(commands), dict[int, JobProcess](), set[int]()
    interruption: InterruptedRun | None = None
    while running or (waiting and interruption is None):
        try:
            while waiting and len(running) < num_parallel and interruption is None:
                number = waiting.popleft()
                started.add(number)
                on_start(number)
                try:
                    running[number] = JobProcess(commands[number], consoles.get(number), cores)
                except OSError as error:
                    started.discard(number)
                    on_end(number, 1, f"cannot be started: {error}")
            for number, process in list(running.items()):
                if (code := process.poll()) is not None:
                    with blocked_signals():  # a signal in between could lose the result
                        on_end(number, code, process.stderr_tail())
                        del running[number]
                        started.discard(number)
            time.sleep(POLL_INTERVAL_S)
        except InterruptedRun as error:  # a second signal is forwarded too, and ends the jobs at once
            interruption = error
            notify(f"{error}: waiting for {len(running)} running jobs to end; a second signal ends them at once")
            for process in running.values():
                process.send(error.exit_code - 128)
    if interruption is not None:
        for number in started:  # the signal arrived before the job's process was created
            on_end(number, interruption.exit_code, "interrupted before it started")
        raise interruption


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Delay signals until this context ends. Start no process in it, because a new process would block them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class JobProcess:
    """The process of one job. It has its own session, so that Ctrl-C does not interrupt it directly."""

    def __init__(self, command: list[str], console: Path | None, cores: int) -> None:
        environment = {**os.environ, CORES_VARIABLE: str(cores), PARENT_VARIABLE: str(os.getpid())}
        self._console: IO[str] | None = None
        if console is not None:
            console.parent.mkdir(parents=True, exist_ok=True)
            self._console = console.open("a")
        self._process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True, errors="replace", bufsize=1,
            stdin=subprocess.DEVNULL, stdout=self._console, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._lines: deque[str] = deque(maxlen=STDERR_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            with suppress(OSError):  # the disk is full; without a reader, the job would wait forever
                print(line, end="", file=self._console or sys.stderr, flush=True)

    def poll(self) -> int | None:
        """Return the exit code of the process, or None while the process runs.

        If a signal killed the process, the exit code is 128 plus the signal number.
        """
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Send the signal with the given number to the process if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def stderr_tail(self) -> str:
        """Return the last lines of the process's standard error. The process must have ended."""
        self._reader.join(timeout=5)
        if self._console is not None:
            self._console.close()
        return "".join(self._lines)
