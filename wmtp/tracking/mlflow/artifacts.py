"""MLflow artifacts of a run: its config, samples and reports, and its best checkpoint."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wmtp.runtime.atomic_files import encode_json
from wmtp.runtime.run_dir import PROVENANCE, RESUMES

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
CheckpointChoice = Literal["best", "none"]
RECORDS = (
    "config.yaml", PROVENANCE, RESUMES, "summary.json", "samples.jsonl", "train.log", "report.html",
    "pretrain/result.json", "pretrain/value_head.safetensors",
)  # fmt: skip
"""Small files that are sent if they exist."""
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
LOCATIONS = f"{CHECKPOINTS}/addresses.json"
"""Artifact with the URLs or paths of checkpoints that are stored outside of MLflow."""


@dataclass(frozen=True)
class Artifact:
    """A file to upload."""

    name: str
    """Path of the file relative to the run's folder."""
    path: Path
    content: bytes | None = None
    """Content of the file if it is not on disk."""
    known_hash: str | None = None
    """Hash that is used as the fingerprint, so that a large file is not read to compute one."""

    def size(self) -> int:
        """Return the size in bytes."""
        return self.path.stat().st_size if self.content is None else len(self.content)

    def fingerprint(self) -> str:
        """Return a hash that is different after the content has changed."""
        if self.known_hash is not None:
            return self.known_hash
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Upload the file as an artifact of a run."""
        if self.content is not None:
            client.log_text(run_id, self.content.decode(), self.name)
        else:
            client.log_artifact(run_id, str(self.path), self.name.rpartition("/")[0] or None)


def artifacts(folder: Path, stored_at: str | None, choice: CheckpointChoice) -> Iterator[Artifact]:
    """Yield the artifacts of a run.

    Args:
        folder: the run's folder.
        stored_at: URL or folder of the run outside of MLflow. If set, the locations of the checkpoints are sent instead
            of checkpoints.
        choice: `best` to send the best checkpoint if `stored_at` is None; `none` to send no checkpoint.
    """
    for name in RECORDS:
        if (folder / name).exists():
            yield Artifact(name, folder / name)
    best = read_best(folder)
    if stored_at is not None and (best is not None or (folder / CHECKPOINTS / "latest.json").exists()):
        yield Artifact(LOCATIONS, folder / LOCATIONS, encode_json(locations(folder, stored_at)))
    elif choice == "best" and best is not None:
        checkpoint = folder / CHECKPOINTS / best["folder"]
        manifest_hash = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            yield Artifact(path.relative_to(folder).as_posix(), path, known_hash=manifest_hash)


def locations(folder: Path, stored_at: str) -> dict[str, str]:
    """Return the URLs or paths of a run, of its checkpoints and of its best checkpoint."""
    best = best_location(folder, stored_at, "none")
    found = {} if best is None else {"best": best}
    return {"run": stored_at, CHECKPOINTS: f"{stored_at}/{CHECKPOINTS}", **found}


def best_location(folder: Path, stored_at: str | None, choice: CheckpointChoice) -> str | None:
    """Return the location of the best checkpoint: its URL or path outside of MLflow, or its artifact path in MLflow.

    The result is None if there is no best checkpoint, or if it is not stored outside of MLflow and not sent.
    """
    best = read_best(folder)
    if best is None or (stored_at is None and choice == "none"):
        return None
    path = f"{CHECKPOINTS}/{best['folder']}"
    return path if stored_at is None else f"{stored_at}/{path}"


def read_best(folder: Path) -> dict[str, Any] | None:
    """Return `folder`, `step` and `val/loss` from best.json, or None if the file is missing or damaged."""
    path = folder / CHECKPOINTS / "best.json"
    if not path.exists():
        return None
    try:
        best: dict[str, Any] = json.loads(path.read_text())
        exists = (folder / CHECKPOINTS / best["folder"] / MANIFEST).exists()
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); the best checkpoint is not sent to MLflow", path, error)
        return None
    return best if exists else None
