"""Create and end the MLflow run of a sweep. It is the parent run of the MLflow runs of the sweep's jobs."""

import logging
import os
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.errors import PendingError
from wmtp.runtime.background import BackgroundSender, format_error
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import SWEEP, display_path
from wmtp.runtime.sweep_jobs import job_labels, read_jobs
from wmtp.tracking.base import State
from wmtp.tracking.mlflow.client import connect
from wmtp.tracking.mlflow.runs import NewRun, UniqueTag, missing_params_and_tags, open_run, origin_tags
from wmtp.tracking.mlflow.sync_state import LOCK, SyncState, current_sync_state, read_sync_state
from wmtp.tracking.mlflow.uri import is_confirmed

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
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
            replace(sync_state, run_id=run_id, experiment_id=experiment_id).write(sweep)
        return run_id


def sweep_params(jobs: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Return the parameters of a sweep: for each overridden key, the different values of the jobs, in their order.

    >>> sweep_params([{"overrides": ["algo=critic", "++seed=0"]}, {"overrides": ["algo=critic", "++seed=1"]}])
    {'algo': 'critic', 'seed': '0, 1'}
    """
    values: dict[str, dict[str, None]] = {}
    for override in (each for job in jobs for each in job["overrides"]):
        key, _, value = override.lstrip("+").partition("=")
        values.setdefault(key.removesuffix("@_global_"), {})[value] = None
    return {key: ", ".join(found) for key, found in values.items()}


def sweep_metrics(jobs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of a sweep: how many jobs have each state, and the lowest loss of a validation."""
    counts = Counter(f"jobs/{job['state'].lower()}" for job in jobs)
    losses = [job["result"]["best_loss"] for job in jobs if job["result"].get("best_loss") is not None]
    return dict(counts) | ({"best/val_loss": min(losses)} if losses else {})


def describe_jobs(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the jobs in Markdown, which MLflow shows as the description of the sweep's run."""
    rows = ["| job | settings | state | last val/loss | best val/loss | updates |", "|---|---|---|---|---|---|"]
    for job, label in zip(jobs, job_labels([job["overrides"] for job in jobs]), strict=True):
        result = job["result"]
        losses = [result.get(name) for name in ("final_loss", "best_loss")]
        cells = [job["number"], as_code(label), as_code(job["state"])]
        cells += ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append(f"| {' | '.join(map(str, [*cells, result.get('total_steps', '-')]))} |")
    return "\n".join(rows)


def as_code(text: object) -> str:
    r"""Return a text as code in a table in Markdown, in which images, links and HTML have no effect.

    >>> as_code("seed=0 |`b`")
    "`seed=0 \\|'b'`"
    """
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


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
    if not is_confirmed(sync_state.uri, folder):
        log.warning("%s: you have not used %s before, so nothing is sent there", folder, sync_state.uri)
        return None
    changed: list[State] = []

    def _send() -> None:
        """Send the final state, the parameters, metrics and description, and sweep.json to the MLflow run."""
        from mlflow.entities import Metric

        retry, run_id = sender.retry, sync_state.run_id
        client, _ = retry(connect, sync_state.uri, sync_state.experiment)
        run = retry(client.get_run, run_id)
        if run.info.status != state:
            retry(client.set_terminated, run_id, state)
            changed.append(state)
        if not (folder / SWEEP).exists():
            return
        jobs = read_jobs(folder)
        params, tags = missing_params_and_tags(run, sweep_params(jobs), {"mlflow.note.content": describe_jobs(jobs)})
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in sweep_metrics(jobs).items()
                   if run.data.metrics.get(name) != value]  # fmt: skip
        retry(client.log_batch, run_id, metrics=metrics, params=params, tags=tags)
        retry(client.log_artifact, run_id, str(folder / SWEEP))

    sender = BackgroundSender(f"MLflow at {sync_state.uri}", _send)
    sender.start()
    if not sender.wait_until_done(STALL_SECONDS, CLOSE_SECONDS):
        error = format_error(sender.last_error) if sender.last_error else "none, a request was still running"
        raise PendingError(
            f"MLflow at {sync_state.uri} did not receive the status {state} of the sweep {display_path(folder)}; "
            f"`python -m wmtp.sync {shlex.quote(display_path(folder))}` sends it. Last error: {error}"
        )
    return f"MLflow: status {state}" if changed else "MLflow: nothing was missing"
