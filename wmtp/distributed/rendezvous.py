"""Where the processes that torchrun started meet before they train: the first one has the task, the others wait."""

import json
import os
import time
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wmtp.distributed.exit_reports import Outcome, encode

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the first one to be reached, which may have data to fetch before."""
TASK_KEY = "task"


@cache  # the first process may hold the store's content, as long as it holds the store
def common_store() -> Store:
    """The store that all processes of the launcher's environment share."""
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"wmtp/{attempt}", store)


class StoreBoard:
    """A board in the store that all processes share."""

    def __init__(self) -> None:
        self.store, self.size = common_store(), int(os.environ["WORLD_SIZE"])

    def put(self, outcome: Outcome) -> None:
        """Leave an outcome, in the place of what this process left before."""
        self.store.set(f"outcome/{outcome.rank}", encode(outcome).decode())

    def read(self) -> dict[int, Outcome]:
        """What was left so far, by rank."""
        left = [rank for rank in range(self.size) if self.store.check([f"outcome/{rank}"])]
        return {rank: Outcome(**json.loads(self.store.get(f"outcome/{rank}"))) for rank in left}


def share_task(task: dict[str, Any]) -> None:
    """Give the other processes, which wait for it, their task."""
    common_store().set(TASK_KEY, json.dumps(task))


def dismiss(exit_code: int) -> None:
    """Let the other processes end with this exit code instead of a task; returns when they know."""
    share_task({"exit_code": exit_code})
    store, deadline = common_store(), time.monotonic() + 60
    others = range(1, int(os.environ["WORLD_SIZE"]))
    while not all(store.check([f"dismissed/{rank}"]) for rank in others) and time.monotonic() < deadline:
        time.sleep(0.05)


def wait_for_task() -> dict[str, Any]:
    """What the first process has to say: a task, or the `exit_code` to end with."""
    store = common_store()
    while not store.check([TASK_KEY]):  # not store.wait(), which no signal interrupts
        time.sleep(0.1)
    task: dict[str, Any] = json.loads(store.get(TASK_KEY))
    if "exit_code" in task:
        store.set(f"dismissed/{os.environ['RANK']}", "")
    return task
