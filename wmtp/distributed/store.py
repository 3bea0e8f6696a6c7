"""Connect the ranks of a run through a key-value store, in which rank 0 sends the input of the job."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wmtp.distributed.process_group import OtherProcessFailed

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
"""Time limit for the connection to rank 0. It is long because rank 0 may download data before it is ready."""
SHUTDOWN_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.05
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


def common_store() -> Store:
    """Return the key-value store that all ranks share. The launcher's environment variables contain its address."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return _connect(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], attempt)


@cache  # rank 0 may host the store, whose content exists only as long as this object
def _connect(address: str, port: str, attempt: str) -> Store:
    store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    return PrefixStore(f"wmtp/{attempt}", store)


def send_input(values: Mapping[str, Any]) -> None:
    """Send the input of the job, as plain JSON values, to the other ranks. They wait for it in `receive_input`."""
    common_store().set(INPUT_KEY, json.dumps(values))


def send_shutdown(exit_code: int) -> None:
    """Make the other ranks end with an exit code, unless they have received the input of a job.

    The function returns when all other ranks have received the exit code, or after `SHUTDOWN_TIMEOUT_S` seconds.
    """
    store = common_store()
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
