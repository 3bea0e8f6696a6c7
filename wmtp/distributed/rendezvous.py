"""Rendezvous of the ranks that torchrun started: rank 0 sends the job's context, the other ranks wait for it."""

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
"""Time limit for connecting to rank 0, which may download data first."""
SHUTDOWN_TIMEOUT_S = 60.0
CONTEXT_KEY = "context"


@cache  # rank 0 may host the store, whose content exists only as long as this object
def common_store() -> Store:
    """Return the key-value store that all ranks of the launcher's environment share."""
    store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"wmtp/{attempt}", store)


class RendezvousReportStore:
    """Exit reports in the store of the rendezvous."""

    def __init__(self) -> None:
        self.store, self.size = common_store(), int(os.environ["WORLD_SIZE"])

    def put(self, report: ExitReport) -> None:
        """Store a report; it replaces an earlier report of the same rank."""
        self.store.set(_report_key(report.rank), encode_report(report).decode())

    def read(self) -> dict[int, ExitReport]:
        """Return the stored reports by rank."""
        stored = [rank for rank in range(self.size) if self.store.check([_report_key(rank)])]
        return {rank: ExitReport(**json.loads(self.store.get(_report_key(rank)))) for rank in stored}


def share_context(context: dict[str, Any]) -> None:
    """Send the context of the job to the other ranks, which wait for it."""
    common_store().set(CONTEXT_KEY, json.dumps(context))


def shutdown_workers(exit_code: int) -> None:
    """End the other ranks with an exit code, because there is no job; return when they have received it."""
    share_context({"exit_code": exit_code})
    store, deadline = common_store(), time.monotonic() + SHUTDOWN_TIMEOUT_S
    others = range(1, int(os.environ["WORLD_SIZE"]))
    while not all(store.check([_shutdown_key(rank)]) for rank in others) and time.monotonic() < deadline:
        time.sleep(0.05)


def wait_for_context() -> dict[str, Any]:
    """Return the message of rank 0: the context of the job, or only `exit_code` if this rank must end."""
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
