"""A watchdog that ends this rank if it hangs after another rank has died, or after a second signal."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from torch.distributed.distributed_c10d import Store

from wmtp.distributed.exit_reports import PEER_FAILED, ExitReport
from wmtp.distributed.process_group import OtherProcessFailed
from wmtp.distributed.store import ProcessAddress
from wmtp.errors import InterruptedRun
from wmtp.runtime.processes import is_alive
from wmtp.runtime.signals import SIGNALS, interrupt_error, is_sigterm_ignored

POLL_INTERVAL_S = 0.5
"""Seconds between checks of the other ranks."""
FAILED_KEY = "failed"
"""Key under which a rank that failed writes its number into the key-value store of the ranks."""
ABORT_GRACE_S, CLOSE_GRACE_S, SIGNAL_GRACE_S = 3.0, 20.0, 5.0
"""Seconds until the watchdog ends this process: after the failure of another rank, after such a failure while this
process closes files and uploads data, and after the second signal."""
BARRIER_POLL_S = 0.05
"""Seconds between checks whether all ranks are done."""
SETTLE_S = 0.2
"""Seconds to wait after a connection to another rank broke, until the end of a dying process can be observed."""


class Watchdog:
    """A thread that ends this process if it hangs although another rank failed or two signals arrived.

    The thread starts before the process group exists, and stops in `exit_barrier`. It looks for ranks that reported a
    failure, and for ranks on this machine that died before they were done. If there is such a rank, this process has a
    few seconds to end by itself. It may be unable to do so, because it waits in a call that cannot be interrupted (for
    example, a collective operation of NCCL). Then the watchdog calls `on_hang` with an error that names the failed
    rank, and ends this process with the exit code that `on_hang` returns. During such a call, Python handles no signal,
    either. Therefore the watchdog counts the signals itself, and the second one has the same effect.
    """

    def __init__(
        self, rank: int, ranks: Sequence[ProcessAddress], store: Store, on_hang: Callable[[BaseException], int]
    ) -> None:
        self.rank, self.size = rank, len(ranks)
        self.store, self.on_hang = store, on_hang
        here = ranks[rank].machine
        self.pids = {
            other: address.pid for other, address in enumerate(ranks) if address.machine == here and other != rank
        }
        self._stopped = threading.Event()
        self._received: list[int] = []
        self._signals, writer = socket.socketpair()
        self._signals.setblocking(False)
        writer.setblocking(False)
        self._writer = writer
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def exit_barrier(self, timeout: float) -> None:
        """Mark this rank as done, wait until all ranks are done, and stop the watchdog.

        Raises:
            OtherProcessFailed: another rank failed before it was done, or is not done after `timeout` seconds.
        """
        self.store.set(_done_key(self.rank), "")
        self._wait_until_done(timeout)
        self.stop()
        self.store.set(_stopped_key(self.rank), "")
        if self.rank == 0:  # rank 0 may host the store, which the other ranks still read
            self._wait_until_stopped()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        signal.set_wakeup_fd(-1)

    def dead_rank(self) -> int | None:
        """Return another rank that failed, or None if there is no such rank.

        A rank counts as failed if its process ran on this machine and died before the rank was done. It also counts as
        failed if it reported a failure.
        """
        for rank, pid in self.pids.items():
            if not is_alive(pid) and not self._has(_done_key(rank)):
                return rank
        with suppress(RuntimeError):  # the store may disappear between two calls
            if self._has(FAILED_KEY) and (failed := int(self.store.get(FAILED_KEY))) != self.rank:
                return failed
        return None

    def report_failure(self) -> None:
        """Record in the key-value store that this rank failed, because other machines cannot check its process."""
        with suppress(RuntimeError):  # the process that hosts the store may be dead
            self.store.set(FAILED_KEY, str(self.rank))

    def attribute_failure(self, report: ExitReport) -> ExitReport:
        """Return the exit report of this rank. If another rank caused the failure, add its number to the message."""
        if report.end != PEER_FAILED:
            return report
        time.sleep(SETTLE_S)
        dead = self.dead_rank()
        return report if dead is None else replace(report, message=f"process {dead} died: {report.message}")

    def _wait_until_done(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._all_have(_done_key):
            if (dead := self.dead_rank()) is not None:
                raise OtherProcessFailed(dead, "ended before the other processes were done", 1)
            is_late = time.monotonic() > deadline
            if is_late and (missing := [rank for rank in range(self.size) if not self._has(_done_key(rank))]):
                raise OtherProcessFailed(missing[0], f"was not done {timeout:g} s after this process", 1)
            time.sleep(BARRIER_POLL_S)

    def _wait_until_stopped(self) -> None:
        deadline = time.monotonic() + ABORT_GRACE_S
        while not self._all_have(_stopped_key) and time.monotonic() < deadline:
            time.sleep(BARRIER_POLL_S)

    def _all_have(self, key: Callable[[int], str]) -> bool:
        """Return whether each rank has set its key. This is one request, because many ranks wait at the same time."""
        return self._has(*map(key, range(self.size)))

    def _has(self, *keys: str) -> bool:
        """Return whether the store contains all keys; False if the process that hosts the store is dead."""
        try:
            return bool(self.store.check(list(keys)))
        except RuntimeError:
            return False

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_INTERVAL_S):
            if (reason := self._reason_to_end()) is not None:
                break
        else:
            return
        grace = SIGNAL_GRACE_S if isinstance(reason, InterruptedRun) else ABORT_GRACE_S
        started = time.monotonic()
        while not self._stopped.wait(0.1):
            if time.monotonic() - started > (CLOSE_GRACE_S if is_sigterm_ignored() else grace):
                os._exit(self.on_hang(reason))

    def _reason_to_end(self) -> BaseException | None:
        """Return an error if another rank has failed or if this process has received two signals, otherwise None."""
        if (dead := self.dead_rank()) is not None:
            return OtherProcessFailed(dead, "died", 1)
        with suppress(BlockingIOError):
            for number in self._signals.recv(4096):
                if number in SIGNALS and not (self._received and number == signal.SIGHUP):
                    self._received.append(number)
        return interrupt_error(self._received[-1]) if len(self._received) > 1 else None


def _done_key(rank: int) -> str:
    return f"done/{rank}"


def _stopped_key(rank: int) -> str:
    return f"stopped/{rank}"
