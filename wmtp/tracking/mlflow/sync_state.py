"""Read and write mlflow.json: the MLflow run of a folder, and the data that were sent to it."""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import SYNC_STATE
from wmtp.tracking.tail import Position

LOCK = Path(".hydra") / "mlflow.lock"
"""Lock file of the process that sends a folder to MLflow. The system releases the lock when the process ends."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncState:
    """The MLflow run of a folder, and the data that were sent to it."""

    run_id: str
    """Id of the MLflow run; empty until the run is created."""
    uri: str
    """Tracking URI of the MLflow store."""
    experiment: str = ""
    run_name: str = ""
    sent: dict[str, Position] = field(default_factory=dict)
    """Position up to which each metric file was sent, by file name."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each artifact that was sent, by artifact name."""

    def position(self, name: str) -> Position:
        """Return the position up to which a file was sent."""
        return self.sent.get(name, Position())

    def with_position(self, name: str, position: Position) -> "SyncState":
        """Return a copy that records that a file was sent up to `position`."""
        return replace(self, sent=self.sent | {name: position})

    def with_artifact(self, name: str, fingerprint: str) -> "SyncState":
        """Return a copy that records that an artifact was sent."""
        return replace(self, artifacts=self.artifacts | {name: fingerprint})

    def write(self, folder: Path) -> None:
        """Write the mlflow.json of a folder."""
        replace_atomically(folder / SYNC_STATE, encode_json(asdict(self)))


def read_sync_state(folder: Path) -> SyncState | None:
    """Return the content of a folder's mlflow.json, or None if there is none.

    Raises:
        InputError: the file is damaged.
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


def current_sync_state(folder: Path, initial: SyncState) -> SyncState:
    """Return the content of mlflow.json, or `initial` if the file is missing or belongs to another store."""
    known = read_sync_state(folder)
    if known is None or known.uri == initial.uri:
        return known or initial
    if known.run_id:
        log.warning("the run was tracked at %s; a new MLflow run is created at %s", known.uri, initial.uri)
    return initial
