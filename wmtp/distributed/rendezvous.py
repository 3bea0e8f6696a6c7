"""Connect the ranks that torchrun started. Rank 0 sends the input of the job, and the other ranks wait for it."""

import json
import os
import time
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wmtp.distributed.exit_reports import ExitReport, encode_report

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
"""Time limit for the connection to rank 0. It is long because rank 0 may download data before it is ready."""
SHUTDOWN_TIMEOUT_S = 60.0
CONTEXT_KEY = "context"


@cache  # rank 0 may host the store, whose content exists only as long as this object
def common_store() -> Store:
    """Return the key-value store that all ranks share. The launcher's environment variables contain its address."""
    store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"wmtp/{attempt}", store)


class RendezvousReportStore:
    """A store that keeps exit reports in the key-value store that all ranks share."""

    def __init__(self) -> None:
        self.store, self.size = common_store(), int(os.environ["WORLD_SIZE"])

    def put(self, report: ExitReport) -> None:
        """Store the report of a rank. It replaces an earlier report of the same rank."""
        self.store.set(_report_key(report.rank), encode_report(report).decode())

    def read(self) -> dict[int, ExitReport]:
        """Return all stored reports, by rank."""
        stored = [rank for rank in range(self.size) if self.store.check([_report_key(rank)])]
        return {rank: ExitReport(**json.loads(self.store.get(_report_key(rank)))) for rank in stored}


def share_context(context: dict[str, Any]) -> None:
    """Send the input of the job to the other ranks, which wait for it in `wait_for_context`."""
    common_store().set(CONTEXT_KEY, json.dumps(context))


def shutdown_workers(exit_code: int) -> None:
    """Make the other ranks end with an exit code, because there is no job for them.

    The function returns when all other ranks have received the exit code, or after `SHUTDOWN_TIMEOUT_S` seconds.
    """
    share_context({"exit_code": exit_code})
    store, deadline = common_store(), time.monotonic() + SHUTDOWN_TIMEOUT_S
    others = range(1, int(os.environ["WORLD_SIZE"]))
    while not all(store.check([_shutdown_key(rank)]) for rank in others) and time.monotonic() < deadline:
        time.sleep(0.05)


def wait_for_context() -> dict[str, Any]:
    """Wait for the message of rank 0, and return it.

    Returns:
        The input of the job. If there is no job, the only key is `exit_code`, and this rank must end with this code.
    """
    store = common_store()
    while not store.check([CONTEXT_KEY]):  # not store.wait(), because a signal cannot interrupt it
        time.sleep(0.1)
    context: dict[str, Any] = json.loads(store.get(CONTEXT_KEY))
    if "exit_code" in context:
        store.set(_shutdown_key(int(os.environ["RANK"])), "")
    return context


def _report_key(rank: int) -> str:
    return f"exit_report/{rank}"


def _shutdown_key(rank: int) -> str:
    return f"shutdown/{rank}"
