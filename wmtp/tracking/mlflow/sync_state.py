"""Read and write mlflow.json. This file contains the id of a folder's MLflow run, and records which data were sent."""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.destinations import require_known
from wmtp.runtime.run_dir import SYNC_STATE
from wmtp.tracking.mlflow.uri import is_confirmed
from wmtp.tracking.tail import Position

LOCK = Path(".hydra") / "mlflow.lock"
"""Path of a lock file in the folder of a run or sweep. The process that sends data of the folder to MLflow locks it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncState:
    """Content of a folder's mlflow.json. It contains the id of the MLflow run, and records which data were sent."""

    run_id: str
    """Id of the MLflow run. The id is empty until the MLflow run is created."""
    uri: str
    """Tracking URI of the MLflow store."""
    experiment: str = ""
    experiment_id: str = ""
    """Id of the experiment. Like the id of the run, it is empty until the MLflow run is created."""
    run_name: str = ""
    sent: dict[str, Position] = field(default_factory=dict)
    """For each metric file, the position up to which it was sent. The dictionary key is the name of the file."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """For each artifact that was sent, a hash of its content. The dictionary key is the name of the artifact."""

    def position(self, name: str) -> Position:
        """Return the position up to which the metric file `name` was sent."""
        return self.sent.get(name, Position())

    def with_position(self, name: str, position: Position) -> "SyncState":
        """Return a copy of this sync state that records that the metric file `name` was sent up to `position`."""
        return replace(self, sent=self.sent | {name: position})

    def with_artifact(self, name: str, fingerprint: str) -> "SyncState":
        """Return a copy of this sync state that records that the artifact `name` was sent with this fingerprint."""
        return replace(self, artifacts=self.artifacts | {name: fingerprint})

    def page(self, *, of_run: bool) -> str:
        """Return the path and fragment of the page of MLflow that shows the run, or all runs of the experiment.

        The type of the workflow is part of the fragment, because MLflow would otherwise show traces instead of runs.
        """
        experiment = f"/#/experiments/{self.experiment_id}/runs"
        return f"{experiment}/{self.run_id}" if of_run else f"{experiment}?workflowType=machine_learning"

    def write(self, folder: Path) -> None:
        """Write this sync state to the mlflow.json of a folder."""
        replace_atomically(folder / SYNC_STATE, encode_json(asdict(self)))


def read_sync_state(folder: Path) -> SyncState | None:
    """Return the content of a folder's mlflow.json, or None if the file is missing.

    Raises:
        InputError: mlflow.json is damaged.
    """
    path = folder / SYNC_STATE
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        known = {name: value for name, value in content.items() if name in SyncState.__dataclass_fields__}
        sent = {name: Position(**position) for name, position in content.get("sent", {}).items()}
        return SyncState(**known | {"sent": sent})
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it: the MLflow run is then found by the id in run.json"
        ) from error


def require_known_store(folder: Path) -> None:
    """Check that the store in a folder's mlflow.json is the default one, or one that this user has used before.

    Raises:
        InputError: mlflow.json is damaged, or the store is not known.
    """
    sync_state = read_sync_state(folder)
    if sync_state is not None and not is_confirmed(sync_state.uri, folder):
        require_known(folder, "tracking.uri", sync_state.uri)


def current_sync_state(folder: Path, initial: SyncState) -> SyncState:
    """Return the content of a folder's mlflow.json.

    Return `initial` if the file is missing, or if its tracking URI differs from the tracking URI of `initial`.
    """
    known = read_sync_state(folder)
    if known is None or known.uri == initial.uri:
        return known or initial
    if known.run_id:
        log.warning("the run was tracked at %s; a new MLflow run is created at %s", known.uri, initial.uri)
    return initial
