"""Create and end the MLflow run of a sweep. It is the parent run of the MLflow runs of the sweep's jobs."""

import os
import shlex
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
"""Time limits of `end_sweep` in seconds. The first applies to a server that does not respond, the second to a server
that responds."""


def sweep_folder(folder: Path) -> Path | None:
    """Return the folder of the sweep to which a run belongs, or None if the run is not part of a sweep."""
    return folder.parent if (folder.parent / SWEEP).exists() else None


def open_sweep_run(client: "MlflowClient", experiment_id: str, sweep: Path, initial: SyncState) -> str:
    """Return the id of a sweep's MLflow run. If the sweep has no MLflow run in this store, create it.

    Args:
        client: client of the MLflow store.
        experiment_id: id of the experiment that contains the run.
        sweep: folder of the sweep.
        initial: sync state for a sweep that has none in this store. It contains the tracking URI of the store.
    """
    with file_lock(sweep / LOCK):
        sync_state = current_sync_state(sweep, initial)
        tag = UniqueTag("wmtp.sweep", str(sweep).replace('"', "_"))
        run = open_run(client, experiment_id, sync_state.run_id, NewRun(sweep.name, tag, origin_tags({})))
        run_id: str = run.info.run_id
        if run_id != sync_state.run_id:
            replace(sync_state, run_id=run_id).write(sweep)
        return run_id


def end_sweep(folder: Path, state: State) -> str | None:
    """Send the final status of a sweep to its MLflow run.

    Returns:
        A message that says whether the status was sent, or None if the sweep has no MLflow run.

    Raises:
        PendingError: MLflow did not accept the status in time.
    """
    folder = Path(os.path.abspath(folder))
    sync_state = read_sync_state(folder)
    if sync_state is None or not sync_state.run_id:
        return None
    changed: list[State] = []

    def _send() -> None:
        """Send the final state and sweep.json to the MLflow run."""
        client, _ = sender.retry(connect, sync_state.uri, sync_state.experiment)
        if sender.retry(client.get_run, sync_state.run_id).info.status != state:
            sender.retry(client.set_terminated, sync_state.run_id, state)
            changed.append(state)
        if (folder / SWEEP).exists():
            sender.retry(client.log_artifact, sync_state.run_id, str(folder / SWEEP))

    sender = BackgroundSender(f"MLflow at {sync_state.uri}", _send)
    sender.start()
    if not sender.wait_until_done(STALL_SECONDS, CLOSE_SECONDS):
        error = format_error(sender.last_error) if sender.last_error else "none, a request was still running"
        raise PendingError(
            f"MLflow at {sync_state.uri} did not receive the status {state} of the sweep {display_path(folder)}; "
            f"`python -m wmtp.sync {shlex.quote(display_path(folder))}` sends it. Last error: {error}"
        )
    return f"MLflow: status {state}" if changed else "MLflow: nothing was missing"
