"""mlflow.json: which MLflow run belongs to a folder, and what of the folder it was sent."""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import RECEIPT
from wmtp.tracking.tail import Position

LOCK = Path(".hydra") / "mlflow.lock"
"""Locked by whoever delivers a folder to MLflow; the system unlocks it however that ends."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Receipt:
    """What is known of a folder's run: its store, its id (empty until it has one), and what was sent of it."""

    run_id: str
    uri: str
    experiment: str = ""
    run_name: str = ""
    sent: dict[str, Position] = field(default_factory=dict)
    """How far each file that grows was sent."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """The artifacts, with what tells whether they changed since."""

    def position(self, name: str) -> Position:
        """How far a file was sent."""
        return self.sent.get(name, Position())

    def at(self, name: str, position: Position) -> "Receipt":
        """The receipt once a file was sent up to `position`."""
        return replace(self, sent=self.sent | {name: position})

    def with_artifact(self, name: str, fingerprint: str) -> "Receipt":
        """The receipt once an artifact was sent."""
        return replace(self, artifacts=self.artifacts | {name: fingerprint})

    def write(self, folder: Path) -> None:
        """Put it into the folder."""
        replace_atomically(folder / RECEIPT, encode_json(asdict(self)))


def read_receipt(folder: Path) -> Receipt | None:
    """What a folder's mlflow.json says; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / RECEIPT
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        known = {name: value for name, value in content.items() if name in Receipt.__dataclass_fields__}
        sent = {name: Position(**position) for name, position in content.get("sent", {}).items()}
        return Receipt(**known | {"sent": sent})
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and the run's id finds its MLflow run") from error


def current_receipt(folder: Path, fresh: Receipt) -> Receipt:
    """What mlflow.json says; `fresh` if there is none, or it is of another store."""
    known = read_receipt(folder)
    if known is None or known.uri == fresh.uri:
        return known or fresh
    if known.run_id:
        log.warning("the run was tracked at %s; a new run is made at %s", known.uri, fresh.uri)
    return fresh
