"""Run the jobs of a sweep as processes of this machine, several at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from wmtp.errors import InterruptedRun
from wmtp.runtime.processes import CORES_VARIABLE, num_cores
from wmtp.runtime.signals import SIGNALS

STDERR_LINES = 60
"""Last lines of standard error that are kept per job."""
POLL_INTERVAL_S = 0.1
SWEEP_PID_VARIABLE = "WMTP_SWEEP"
"""Environment variable of a job with the process id of its sweep; the job is killed when that process ends."""
OnStart = Callable[[int], None]
"""Callback with the number of a job that starts."""
OnEnd = Callable[[int, int, str], None]
"""Callback with a job's number, its exit code (128 + signal if killed) and its last lines of standard error."""


def run_local(
    commands: Mapping[int, list[str]], consoles: Mapping[int, Path], num_parallel: int, on_start: OnStart, on_end: OnEnd
) -> None:
    """Run the commands of jobs, `num_parallel` at a time; each gets an equal share of the cores.

    An interruption is forwarded to the running jobs; the function waits until they have ended.

    Args:
        commands: command line of each job, by job number.
        consoles: file for the output of each job; used only if several jobs run at a time.
        num_parallel: number of jobs that run at a time.
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
                    running[number] = JobProcess(
                        commands[number], consoles[number] if num_parallel > 1 else None, cores
                    )
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
            for process in running.values():
                process.send(error.exit_code - 128)
    if interruption is not None:
        for number in started:  # the signal arrived before the job's process was created
            on_end(number, interruption.exit_code, "interrupted before it started")
        raise interruption


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Delay signals inside this context. Start no process inside: it would inherit the blocked signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class JobProcess:
    """The process of one job, in its own session, so that Ctrl-C reaches it only through `send`."""

    def __init__(self, command: list[str], console: Path | None, cores: int) -> None:
        environment = {**os.environ, CORES_VARIABLE: str(cores), SWEEP_PID_VARIABLE: str(os.getpid())}
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
            print(line, end="", file=self._console or sys.stderr, flush=True)

    def poll(self) -> int | None:
        """Return the exit code (128 + signal if a signal killed the process), or None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Send a signal to the process if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def stderr_tail(self) -> str:
        """Return the last lines of standard error of a process that has ended."""
        self._reader.join(timeout=5)
        if self._console is not None:
            self._console.close()
        return "".join(self._lines)
