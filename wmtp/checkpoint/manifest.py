"""Write and verify the manifest of a checkpoint, which contains the SHA-256 of every other file of the checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any

from wmtp.runtime.atomic_files import encode_json, write_synced

NAME = "manifest.json"
FORMAT = 1
Entries = dict[str, dict[str, Any]]
"""Manifest entries by file name. An entry contains the file's SHA-256 (`sha256`) and its length (`bytes`)."""


def entries(paths: list[Path]) -> Entries:
    """Return the manifest entries of the files with the given paths."""
    return {path.name: {"sha256": file_hash(path), "bytes": path.stat().st_size} for path in sorted(paths)}


def write(folder: Path, step: int, files: Entries) -> None:
    """Write the manifest of a checkpoint. A checkpoint without a manifest counts as incomplete."""
    write_synced(folder / NAME, _add_hash({"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}))


def file_names(folder: Path) -> set[str]:
    """Return the file names that the manifest of a checkpoint lists. Do not verify the manifest."""
    return set(json.loads((folder / NAME).read_bytes())["files"])


def manifest_hash(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest file. Checkpoints with different content have different hashes.

    The other files of the checkpoint are not verified.
    """
    return file_hash(checkpoint / NAME)


def parse(manifest_bytes: bytes) -> Entries:
    """Verify a manifest against the hash that it contains, and return its entries.

    Raises:
        ValueError: the manifest is damaged, or it lists itself or a file outside the checkpoint's folder.
    """
    try:
        content = json.loads(manifest_bytes)
        del content["sha256"]
        files = {name: {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for name, e in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{NAME} is damaged: {type(error).__name__}: {error}") from error
    if _add_hash(content) != manifest_bytes:
        raise ValueError(f"{NAME} does not have the content that was written")
    if outside := [name for name in files if Path(name).name != name or name in ("..", NAME) or "\0" in name]:
        raise ValueError(f"{NAME} names files that a checkpoint cannot have: {outside}")
    return files


def find_damage(folder: Path) -> str | None:
    """Compare the files of a checkpoint with its manifest.

    Returns:
        A message about the first damaged or missing file, or None if the checkpoint is undamaged.
    """
    try:
        for name, entry in parse((folder / NAME).read_bytes()).items():
            if file_hash(folder / name) != entry["sha256"]:
                return f"{name} does not have the content that was written"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        return str(error)
    return None


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add_hash(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as JSON. Add a field `sha256` with the hash of all other fields."""
    return encode_json(manifest | {"sha256": hashlib.sha256(encode_json(manifest)).hexdigest()})
