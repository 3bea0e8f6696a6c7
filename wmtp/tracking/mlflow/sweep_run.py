"""A sweep in MLflow: a run of its own, whose children are the sweep's jobs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.errors import PendingError
from wmtp.runtime.background import Courier, described
from wmtp.runtime.locks import one_at_a_time
from wmtp.runtime.run_dir import SWEEP, typed
from wmtp.tracking.base import State
from wmtp.tracking.mlflow.client import connect
from wmtp.tracking.mlflow.runs import Mark, NewRun, open_run, origin_tags
from wmtp.tracking.mlflow.sync_state import LOCK, Receipt, current_receipt, read_receipt

if TYPE_CHECKING:
    from mlflow import MlflowClient

STALL_SECONDS, CLOSE_SECONDS = 5.0, 60.0


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that a run is a job of."""
    return folder.parent if (folder.parent / SWEEP).exists() else None


def sweep_run(client: "MlflowClient", experiment_id: str, sweep: Path, fresh: Receipt) -> str:
    """The id of the sweep's own run, which the first of its jobs makes in the store and experiment of `fresh`."""
    with one_at_a_time(sweep / LOCK):
        receipt = current_receipt(sweep, fresh)
        mark = Mark("wmtp.sweep", str(sweep).replace('"', "_"))
        run = open_run(client, experiment_id, receipt.run_id, NewRun(sweep.name, mark, origin_tags({})))
        run_id: str = run.info.run_id
        if run_id != receipt.run_id:
            replace(receipt, run_id=run_id).write(sweep)
        return run_id


def end_sweep(folder: Path, state: State) -> str | None:
    """Give a sweep's own run its final status; what was sent, or None if no job of it has a run in MLflow.

    Raises:
        PendingError: it was not taken.
    """
    folder = Path(os.path.abspath(folder))
    receipt = read_receipt(folder)
    if receipt is None or not receipt.run_id:
        return None
    changed: list[State] = []

    def deliver() -> None:
        client, _ = courier.retried(connect, receipt.uri, receipt.experiment)
        if courier.retried(client.get_run, receipt.run_id).info.status != state:
            courier.retried(client.set_terminated, receipt.run_id, state)
            changed.append(state)
        if (folder / SWEEP).exists():
            courier.retried(client.log_artifact, receipt.run_id, str(folder / SWEEP))

    courier = Courier(f"MLflow at {receipt.uri}", deliver)
    courier.start()
    for _ in courier.finish(STALL_SECONDS, CLOSE_SECONDS):
        pass
    if not courier.is_done:
        error = described(courier.last_error) if courier.last_error else "none, it was still busy"
        raise PendingError(
            f"MLflow at {receipt.uri} was not told that the sweep {typed(folder)} is {state}; "
            f"python -m wmtp.sync {typed(folder)} tells it. Last error: {error}"
        )
    return f"MLflow: status {state}" if changed else "MLflow: nothing was missing"
