"""What of a run's folder becomes an artifact in MLflow: its records, its report and its best checkpoint."""

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
Choice = Literal["best", "none"]
RECORDS = (
    "config.yaml", PROVENANCE, RESUMES, "summary.json", "samples.jsonl", "train.log", "report.html",
    "pretrain/result.json", "pretrain/value_head.safetensors",
)  # fmt: skip
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
ADDRESSES = f"{CHECKPOINTS}/addresses.json"


@dataclass(frozen=True)
class Artifact:
    """A file of a run's folder, by its path in it; `content` stands for one that is not there.

    `seal` tells whether it changed, where its own hash would take long.
    """

    name: str
    path: Path
    content: bytes | None = None
    seal: str | None = None

    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.content is None else len(self.content)

    def fingerprint(self) -> str:
        """What changes with its content."""
        if self.seal is not None:
            return self.seal
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Put it among the artifacts of a run, under its name."""
        if self.content is not None:
            client.log_text(run_id, self.content.decode(), self.name)
        else:
            client.log_artifact(run_id, str(self.path), self.name.rpartition("/")[0] or None)


def artifacts(folder: Path, kept_at: str | None, choice: Choice) -> Iterator[Artifact]:
    """The artifacts that a folder has now. Of checkpoints that are kept elsewhere, only the addresses are sent."""
    for name in RECORDS:
        if (folder / name).exists():
            yield Artifact(name, folder / name)
    best = read_best(folder)
    if kept_at is not None and (best is not None or (folder / CHECKPOINTS / "latest.json").exists()):
        yield Artifact(ADDRESSES, folder / ADDRESSES, encode_json(addresses(folder, kept_at)))
    elif choice == "best" and best is not None:
        checkpoint = folder / CHECKPOINTS / best["folder"]
        seal = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            yield Artifact(path.relative_to(folder).as_posix(), path, seal=seal)


def addresses(folder: Path, kept_at: str) -> dict[str, str]:
    """Where a run and its best checkpoint are kept."""
    best = best_address(folder, kept_at, "none")
    found = {} if best is None else {"best": best}
    return {"run": kept_at, CHECKPOINTS: f"{kept_at}/{CHECKPOINTS}", **found}


def best_address(folder: Path, kept_at: str | None, choice: Choice) -> str | None:
    """Where the best checkpoint lies: where it is kept, or its path among the artifacts; None if in neither."""
    best = read_best(folder)
    if best is None or (kept_at is None and choice == "none"):
        return None
    path = f"{CHECKPOINTS}/{best['folder']}"
    return path if kept_at is None else f"{kept_at}/{path}"


def read_best(folder: Path) -> dict[str, Any] | None:
    """Which `folder` holds the best checkpoint, its `step` and its `val/loss`; None if none is marked or here."""
    path = folder / CHECKPOINTS / "best.json"
    if not path.exists():
        return None
    try:
        best: dict[str, Any] = json.loads(path.read_text())
        is_here = (folder / CHECKPOINTS / best["folder"] / MANIFEST).exists()
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); MLflow is not told which checkpoint is the best", path, error)
        return None
    return best if is_here else None
