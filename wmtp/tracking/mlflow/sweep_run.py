"""The MLflow run of a sweep. It is the parent run of the MLflow runs of the jobs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.errors import PendingError
from wmtp.runtime.background import BackgroundSender, format_error
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import SWEEP, display_path
from wmtp.tracking.base import State
from wmtp.tracking.mlflow.client import connect
from wmtp.tracking.mlflow.runs import NewRun, UniqueTag, open_run, origin_tags
from wmtp.tracking.mlflow.sync_state import LOCK, SyncState, current_sync_state, read_sync_state

if TYPE_CHECKING:
    from mlflow import MlflowClient

STALL_SECONDS, CLOSE_SECONDS = 5.0, 60.0
"""Maximum seconds that `end_sweep` waits: for a server that does not respond, and for a server that responds."""


def sweep_folder(folder: Path) -> Path | None:
    """Return the folder of the sweep to which a run belongs, or None if the run is not a job of a sweep."""
    return folder.parent if (folder.parent / SWEEP).exists() else None


def open_sweep_run(client: "MlflowClient", experiment_id: str, sweep: Path, initial: SyncState) -> str:
    """Return the id of a sweep's MLflow run. If there is none in the store of `initial`, create it."""
    with file_lock(sweep / LOCK):
        sync_state = current_sync_state(sweep, initial)
        tag = UniqueTag("wmtp.sweep", str(sweep).replace('"', "_"))
        run = open_run(client, experiment_id, sync_state.run_id, NewRun(sweep.name, tag, origin_tags({})))
        run_id: str = run.info.run_id
        if run_id != sync_state.run_id:
            replace(sync_state, run_id=run_id).write(sweep)
        return run_id


def end_sweep(folder: Path, state: State) -> str | None:
    """Set the final status of a sweep's MLflow run. Return a message, or None if the sweep has no MLflow run.

    Raises:
        PendingError: MLflow did not accept the status in time.
    """
    folder = Path(os.path.abspath(folder))
    sync_state = read_sync_state(folder)
    if sync_state is None or not sync_state.run_id:
        return None
    changed: list[State] = []

    def _send() -> None:
        client, _ = sender.retry(connect, sync_state.uri, sync_state.experiment)
        if sender.retry(client.get_run, sync_state.run_id).info.status != state:
            sender.retry(client.set_terminated, sync_state.run_id, state)
            changed.append(state)
        if (folder / SWEEP).exists():
            sender.retry(client.log_artifact, sync_state.run_id, str(folder / SWEEP))

    sender = BackgroundSender(f"MLflow at {sync_state.uri}", _send)
    sender.start()
    for _ in sender.drain(STALL_SECONDS, CLOSE_SECONDS):
        pass
    if not sender.is_done:
        error = format_error(sender.last_error) if sender.last_error else "none, a request was still running"
        raise PendingError(
            f"MLflow at {sync_state.uri} did not receive the status {state} of the sweep {display_path(folder)}; "
            f"`python -m wmtp.sync {display_path(folder)}` sends it. Last error: {error}"
        )
    return f"MLflow: status {state}" if changed else "MLflow: nothing was missing"
