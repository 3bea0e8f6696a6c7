"""A sweep's jobs as processes of this machine, some at once."""

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
from wmtp.runtime.processes import SHARE, num_cores
from wmtp.runtime.signals import SIGNALS

LAST_LINES = 60
"""Of what a job writes to standard error, so many lines are kept."""
LOOK_EVERY = 0.1
PARENT = "WMTP_SWEEP"
"""In the environment of a job: the process of its sweep, with which it dies."""
Started = Callable[[int], None]
Ended = Callable[[int, int, str], None]


def run_here(
    commands: Mapping[int, list[str]], consoles: Mapping[int, Path], at_once: int, started: Started, ended: Ended
) -> None:
    """Run commands, by their numbers, `at_once` of them at a time, each with an equal share of the cores.

    Where several run at once, what they print goes to their consoles. An interruption is passed on to those that
    run, and waited for.

    Args:
        commands: what to run.
        consoles: files for what they print.
        at_once: how many.
        started: told each number.
        ended: told number, exit code (128 + signal for a killed one) and last words.

    Raises:
        InterruptedRun: a signal came; what ran has ended.
    """
    cores = max(1, num_cores() // at_once)
    waiting, running, begun = deque(commands), dict[int, JobProcess](), set[int]()
    interruption: InterruptedRun | None = None
    while running or (waiting and interruption is None):
        try:
            while waiting and len(running) < at_once and interruption is None:
                number = waiting.popleft()
                begun.add(number)
                started(number)
                try:
                    running[number] = JobProcess(commands[number], consoles[number] if at_once > 1 else None, cores)
                except OSError as error:
                    begun.discard(number)
                    ended(number, 1, f"cannot be started: {error}")
            for number, process in list(running.items()):
                if (code := process.poll()) is not None:
                    with held_signals():  # or else its result could be lost
                        ended(number, code, process.last_words())
                        del running[number]
                        begun.discard(number)
            time.sleep(LOOK_EVERY)
        except InterruptedRun as error:  # the second one ends the jobs at once, as it would a single one
            interruption = error
            for process in running.values():
                process.send(error.exit_code - 128)
    if interruption is not None:
        for number in begun:  # the signal came before its process did
            ended(number, interruption.exit_code, "interrupted before it began")
        raise interruption


@contextmanager
def held_signals() -> Iterator[None]:
    """Inside, signals wait. No process may be started there: it would wait for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class JobProcess:
    """One command as a process in a session of its own, so that Ctrl-C reaches it from here alone."""

    def __init__(self, command: list[str], console: Path | None, cores: int) -> None:
        environment = {**os.environ, SHARE: str(cores), PARENT: str(os.getpid())}
        self._console: IO[str] | None = None
        if console is not None:
            console.parent.mkdir(parents=True, exist_ok=True)
            self._console = console.open("a")
        self._process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True, errors="replace", bufsize=1,
            stdin=subprocess.DEVNULL, stdout=self._console, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            print(line, end="", file=self._console or sys.stderr, flush=True)

    def poll(self) -> int | None:
        """The exit code, 128 + signal where one killed it; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def last_words(self) -> str:
        """What an ended process wrote last to standard error."""
        self._reader.join(timeout=5)
        if self._console is not None:
            self._console.close()
        return "".join(self._lines)
