"""Select the files of a run that are sent to MLflow as artifacts: config, samples, reports and the best checkpoint."""

import hashlib
import json
import logging
import re
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
"""Paths of small files that are sent to MLflow if they exist. The paths are relative to the run's folder."""
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
CHECKPOINT = re.compile(r"step_\d{8,}")
"""Pattern of the name of a checkpoint's folder. It cannot lead out of the run's folder."""
LOCATIONS = f"{CHECKPOINTS}/addresses.json"
"""Name of the artifact that contains the URLs or paths of checkpoints that are stored outside of MLflow."""


@dataclass(frozen=True)
class Artifact:
    """A file that is uploaded to MLflow as an artifact of a run."""

    name: str
    """Name of the artifact in MLflow. It is the path of the file relative to the run's folder."""
    path: Path
    content: bytes | None = None
    """Content of the file. None if the file is on disk at `path`."""
    known_hash: str | None = None
    """Hash that is used as the fingerprint. If it is None, the hash of the content is computed."""

    def size(self) -> int:
        """Return the size of the content in bytes."""
        return self.path.stat().st_size if self.content is None else len(self.content)

    def fingerprint(self) -> str:
        """Return a hash that changes when the content of the file changes."""
        if self.known_hash is not None:
            return self.known_hash
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Upload the file as an artifact of the MLflow run with the id `run_id`."""
        if self.content is not None:
            client.log_text(run_id, self.content.decode(), self.name)
        else:
            client.log_artifact(run_id, str(self.path), self.name.rpartition("/")[0] or None)


def artifacts(folder: Path, stored_at: str | None, choice: CheckpointChoice) -> Iterator[Artifact]:
    """Yield the files of a run that are sent to MLflow as artifacts.

    Args:
        folder: the run's folder.
        stored_at: URL or path of the run outside of MLflow, or None. If it is set, MLflow receives a file with the
            locations of the checkpoints, and no checkpoint.
        choice: `best` to send the best checkpoint if `stored_at` is None. `none` to send no checkpoint.
    """
    for name in RECORDS:
        if (folder / name).exists():
            yield Artifact(name, folder / name)
    best = read_best(folder)
    if stored_at is not None and (best is not None or (folder / CHECKPOINTS / "latest.json").exists()):
        yield Artifact(LOCATIONS, folder / LOCATIONS, encode_json(locations(folder, stored_at)))
    elif choice == "best" and best is not None:
        checkpoint = folder / CHECKPOINTS / best["folder"]
        manifest_hash = Artifact(MANIFEST, checkpoint / MANIFEST).fingerprint()
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            yield Artifact(path.relative_to(folder).as_posix(), path, known_hash=manifest_hash)


def locations(folder: Path, stored_at: str) -> dict[str, str]:
    """Return a dictionary with the locations of a run, of its checkpoints and of its best checkpoint.

    `stored_at` is the URL or the path of the run outside of MLflow. All locations start with it.
    """
    best = best_location(folder, stored_at, "none")
    found = {} if best is None else {"best": best}
    return {"run": stored_at, CHECKPOINTS: f"{stored_at}/{CHECKPOINTS}", **found}


def best_location(folder: Path, stored_at: str | None, choice: CheckpointChoice) -> str | None:
    """Return the location of a run's best checkpoint, or None if there is no such location.

    If `stored_at`, the URL or path of the run outside of MLflow, is set, the location is a URL or path below it.
    Otherwise, the location is the path of the artifact in MLflow if `choice` is `best`.
    """
    best = read_best(folder)
    if best is None or (stored_at is None and choice == "none"):
        return None
    path = f"{CHECKPOINTS}/{best['folder']}"
    return path if stored_at is None else f"{stored_at}/{path}"


def read_best(folder: Path) -> dict[str, Any] | None:
    """Return the content of a run's best.json: the fields `folder`, `step` and `val/loss` of the best checkpoint.

    Return None if the file is missing or damaged, or if the checkpoint does not exist on disk.
    """
    path = folder / CHECKPOINTS / "best.json"
    if not path.exists():
        return None
    try:
        best: dict[str, Any] = json.loads(path.read_text())
        if not CHECKPOINT.fullmatch(best["folder"]):
            raise ValueError(f"{best['folder']} is not the name of a checkpoint")
        exists = (folder / CHECKPOINTS / best["folder"] / MANIFEST).exists()
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); the best checkpoint is not sent to MLflow", path, error)
        return None
    return best if exists else None
