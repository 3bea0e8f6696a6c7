"""Checkpoints on disk: atomic, hashed, free of pickle.

A checkpoint is staged in a hidden folder, put on the disk file by file, sealed by a manifest with the
SHA-256 of each file, and renamed into place. Whoever finds `step_…/manifest.json` finds a whole one.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from wmtp.annotations import Positive
from wmtp.checkpoint.state import Snapshot, Tensors
from wmtp.errors import InputError
from wmtp.runtime.files import encode_json, replace_atomically, sync_folder, write_synced

log = logging.getLogger(__name__)
FORMAT = 1
STAGING = ".staging-"


class CheckpointStore:
    """The checkpoints of one run: the last `keep_last`, and the best."""

    def __init__(self, folder: Path, *, keep_last: Positive = 2) -> None:
        self.folder = folder / "checkpoints"
        self.keep_last = keep_last

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write the checkpoint of a step, note it as the latest, and prune.

        Raises:
            TypeError: the state holds something that is not plain JSON; nothing was written then.
        """
        state = encode_json(snapshot.state)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{STAGING}*"):
            shutil.rmtree(leftover)
        final = self.folder / f"step_{step:08d}"
        staged = self.folder / f"{STAGING}{final.name}"
        staged.mkdir()
        _save_tensors(snapshot.model, staged / "model.safetensors")
        _save_tensors(snapshot.optimizer, staged / "optimizer.safetensors")
        write_synced(staged / "state.json", state)
        files = {
            path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(staged.iterdir())
        }
        write_synced(staged / "manifest.json", _sealed({"format": FORMAT, "step": step, "files": files}))
        sync_folder(staged)
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
        sync_folder(self.folder)
        self._note("latest", {"folder": final.name, "step": step})
        self._prune()
        return final

    def mark_best(self, step: int, value: float) -> None:
        """Note the checkpoint of a step as the best, if it is there; it is never pruned."""
        if not (self.folder / f"step_{step:08d}").exists():
            return
        self._note("best", {"folder": f"step_{step:08d}", "step": step, "val/loss": value})
        self._prune()

    def best(self) -> Path | None:
        """The checkpoint that was marked as the best, if it is there."""
        path = self.folder / "best.json"
        if not path.exists():
            return None
        best = self.folder / str(json.loads(path.read_text())["folder"])
        return best if best.exists() else None

    def any(self) -> bool:
        """Whether there is a checkpoint at all, whole or not."""
        return any(self.folder.glob("step_*/manifest.json"))

    def latest(self) -> Path:
        """The newest checkpoint that is whole; damaged ones are named in a warning and passed over.

        Raises:
            InputError: there is none.
        """
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            problem = damage(path)
            if problem is None:
                return path
            aside = path.with_name(f"damaged-{path.name}")
            log.warning("%s is damaged (%s); set aside as %s, the one before is used", path, problem, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        raise InputError(f"{self.folder}: no whole checkpoint is there")

    def _note(self, name: str, content: dict[str, Any]) -> None:
        replace_atomically(self.folder / f"{name}.json", encode_json(content))

    def _prune(self) -> None:
        kept = {path.name for path in sorted(self.folder.glob("step_*"))[-self.keep_last :]}
        best = self.folder / "best.json"
        if best.exists():
            kept.add(json.loads(best.read_text())["folder"])
        for path in self.folder.glob("step_*"):
            if path.name not in kept:
                shutil.rmtree(path)


def _save_tensors(tensors: Tensors, path: Path) -> None:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest with a hash of its own."""
    return encode_json(manifest | {"sha256": hashlib.sha256(encode_json(manifest)).hexdigest()})


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, found before anything parses them; None if nothing is."""
    try:
        written = (path / "manifest.json").read_bytes()
        manifest = json.loads(written)
        del manifest["sha256"]
        if _sealed(manifest) != written:
            return "manifest.json does not have the content that was written"
        for name, entry in manifest["files"].items():
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} does not have the content that was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load(path: Path) -> Snapshot:
    """Read a checkpoint.

    Raises:
        InputError: it is damaged or not there.
    """
    problem = damage(path)
    if problem is not None:
        raise InputError(f"{path}: no whole checkpoint: {problem}")
    return Snapshot(
        load_file(path / "model.safetensors"),
        load_file(path / "optimizer.safetensors"),
        json.loads((path / "state.json").read_text()),
    )
