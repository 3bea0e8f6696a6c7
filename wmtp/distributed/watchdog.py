"""The other processes of a run, as long as one works with them."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from wmtp.distributed.exit_reports import SUFFERED, Outcome
from wmtp.distributed.process_group import OtherProcessFailed, Processes
from wmtp.runtime.processes import is_alive
from wmtp.runtime.signals import closes_in_peace

LOOK_EVERY = 0.5
"""Seconds between looks at the other processes."""
FAILED = "failed"
"""The key in the store that holds the rank of a process that failed."""
GRACE, GRACE_TO_CLOSE = 3.0, 20.0
"""Seconds that a process has to fail by itself when another is gone; and while it closes what it opened."""


class Peers:
    """The other processes of a run, seen by one of them, from the time they met until they part.

    When one of them fails, or is gone on this machine without a farewell, this process has a few seconds to fail by
    itself; if it does not, because it waits in a call that nothing interrupts, it is ended with the exit code that
    `last_act` returns, which is told who is gone.
    """

    def __init__(self, processes: Processes, store: Store, last_act: Callable[[int], int]) -> None:
        self.rank, self.size = processes.rank, processes.size
        self.store, self.last_act = store, last_act
        everyone = processes.gather([_machine(), os.getpid()])
        self.pids = {
            rank: pid for rank, (machine, pid) in enumerate(everyone) if machine == _machine() and rank != self.rank
        }
        self._parted = threading.Event()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def part(self, patience: float) -> None:
        """Say farewell and wait until all others have done so; then this process may end, and none will miss it.

        Raises:
            OtherProcessFailed: one is gone without a farewell, or has not said it after `patience` seconds.
        """
        self.store.set(f"farewell/{self.rank}", "")
        self._wait("farewell", patience)
        self._parted.set()
        self.store.set(f"parted/{self.rank}", "")
        if self.rank == 0:  # the store may live in this process, and the others still ask it
            self._wait("parted", GRACE)

    def lost(self) -> int | None:
        """The rank of a process of this machine that is gone without a farewell, or of any that said it failed."""
        for rank, pid in self.pids.items():
            if not is_alive(pid) and not self._has(f"farewell/{rank}"):
                return rank
        with suppress(RuntimeError):  # the store may go between two calls
            if self._has(FAILED) and (failed := int(self.store.get(FAILED))) != self.rank:
                return failed
        return None

    def tell_failed(self) -> None:
        """Let the processes of other machines know, too."""
        with suppress(RuntimeError):  # the store may be gone with the process that held it
            self.store.set(FAILED, str(self.rank))

    def blamed(self, outcome: Outcome) -> Outcome:
        """How this process ended, naming the process whose death took it along, if one did."""
        if outcome.end != SUFFERED:
            return outcome
        time.sleep(0.2)  # a connection breaks a little before its process is gone
        lost = self.lost()
        return outcome if lost is None else replace(outcome, message=f"process {lost} is gone: {outcome.message}")

    def _wait(self, word: str, patience: float) -> None:
        deadline = time.monotonic() + patience
        while missing := [rank for rank in range(self.size) if not self._has(f"{word}/{rank}")]:
            if word == "farewell" and (lost := self.lost()) is not None:
                raise OtherProcessFailed(lost, "ended before the others were done", 1)
            if time.monotonic() > deadline:
                if word == "parted":
                    return
                raise OtherProcessFailed(missing[0], f"was not done {patience:g} s after this one", 1)
            time.sleep(0.02)

    def _has(self, key: str) -> bool:
        """Whether something is in the store; a store that is gone, as its process is, holds nothing."""
        try:
            return bool(self.store.check([key]))
        except RuntimeError:
            return False

    def _watch(self) -> None:
        while not self._parted.wait(LOOK_EVERY):
            if (lost := self.lost()) is not None:
                break
        else:
            return
        started = time.monotonic()
        while not self._parted.wait(0.1):
            waited = time.monotonic() - started
            if waited > (GRACE_TO_CLOSE if closes_in_peace() else GRACE):
                os._exit(self.last_act(lost))


def _machine() -> str:
    """The machine, and in it the part whose process numbers this process sees."""
    return socket.gethostname() + (str(Path("/proc/self/ns/pid").readlink()) if sys.platform == "linux" else "")
