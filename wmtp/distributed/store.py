"""Connect the ranks of a run through a key-value store, in which rank 0 sends the input of the job."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wmtp.distributed.process_group import OtherProcessFailed
from wmtp.runtime.standard_streams import write_error

RENDEZVOUS_TIMEOUT_S = 1800.0
"""Time limit for the connection to rank 0. It is long because rank 0 may download data before it is ready."""
WAIT_NOTICE_S = 5.0
"""Seconds of waiting for this connection after which a message says so."""
SHUTDOWN_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.05
SIGNAL_EXIT_CODES = 128
"""Exit codes above this number mean that a signal ended the process."""
INPUT_KEY = "input"


class ProcessAddress(NamedTuple):
    """The machine on which a rank runs, and the id of its process."""

    machine: str
    """Host name and namespace of process ids. A process id is valid only within this combination."""
    pid: int

    @classmethod
    def own(cls) -> "ProcessAddress":
        """Return the address of this process."""
        namespace = str(Path("/proc/self/ns/pid").readlink()) if sys.platform == "linux" else ""
        return cls(socket.gethostname() + namespace, os.getpid())


def common_store(timeout: float = RENDEZVOUS_TIMEOUT_S) -> Store:
    """Return the key-value store that all ranks share. The launcher's environment variables contain its address.

    Raises:
        TimeoutError: the other ranks were not found after `timeout` seconds.
    """
    rank, address = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    connection = _connect(*address, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        return connection.result(min(timeout, WAIT_NOTICE_S))
    except TimeoutError:
        if connection.done() or timeout <= WAIT_NOTICE_S:
            raise
    others = "process 0" if rank else "the other processes"
    write_error(
        f"process {rank} of {os.environ['WORLD_SIZE']} waits for {others} at {':'.join(address)}; "
        "if you did not start several processes, press Ctrl-C and run: unset RANK WORLD_SIZE"
    )
    return connection.result(timeout - WAIT_NOTICE_S)


@cache  # rank 0 may host the store, whose content exists only as long as this object
def _connect(address: str, port: str, attempt: str) -> "Future[Store]":
    """Start to connect to the store in a thread, because a signal cannot interrupt this function of torch."""
    connection: Future[Store] = Future()

    def _run() -> None:
        """Connect to the store, and keep the result or the error."""
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S)))
            connection.set_result(PrefixStore(f"wmtp/{attempt}", store))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            connection.set_exception(error)

    threading.Thread(target=_run, name="connection", daemon=True).start()
    return connection


def send_input(values: Mapping[str, Any]) -> None:
    """Send the input of the job, as plain JSON values, to the other ranks. They wait for it in `receive_input`."""
    common_store().set(INPUT_KEY, json.dumps(values))


def send_shutdown(exit_code: int) -> None:
    """Make the other ranks end with an exit code, unless they have received the input of a job.

    The function returns when all other ranks have received the exit code, or after `SHUTDOWN_TIMEOUT_S` seconds. After
    an interruption, it does not wait for ranks that have not been found yet.
    """
    try:
        store = common_store(SHUTDOWN_TIMEOUT_S if exit_code < SIGNAL_EXIT_CODES else POLL_INTERVAL_S)
    except (TimeoutError, RuntimeError):  # there are no other ranks
        return
    if store.check([INPUT_KEY]):
        return
    send_input({"exit_code": exit_code})
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    others = [f"shutdown/{rank}" for rank in range(1, int(os.environ["WORLD_SIZE"]))]
    while not all(store.check([key]) for key in others) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)


def receive_input() -> dict[str, Any]:
    """Wait for the message of rank 0, and return it.

    Returns:
        The input of the job. If there is no job, the only key is `exit_code`, and this rank must end with this code.
    """
    store = common_store()
    while not store.check([INPUT_KEY]):  # not store.wait(), because a signal cannot interrupt it
        time.sleep(POLL_INTERVAL_S)
    values: dict[str, Any] = json.loads(store.get(INPUT_KEY))
    if "exit_code" in values:
        store.set(f"shutdown/{os.environ['RANK']}", "")
    return values


def wait_for_ranks(
    store: Store, rank: int, size: int, exit_codes: Callable[[], Mapping[int, int]]
) -> list[ProcessAddress]:
    """Wait until all ranks have called this function, and return their addresses. A signal can interrupt this wait.

    Raises:
        OtherProcessFailed: the process of a rank has ended, according to `exit_codes`.
    """
    keys = [f"ready/{other}" for other in range(size)]
    store.set(keys[rank], json.dumps(ProcessAddress.own()))
    while not store.check(keys):
        if ended := [other for other in exit_codes() if not store.check([keys[other]])]:
            raise OtherProcessFailed(ended[0], "ended before the run started", 1)
        time.sleep(POLL_INTERVAL_S)
    return [ProcessAddress(*json.loads(store.get(key))) for key in keys]
