"""The manifest of a checkpoint. It contains the SHA-256 of each file, which is checked before the file is parsed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from wmtp.runtime.atomic_files import encode_json, write_synced

NAME = "manifest.json"
FORMAT = 1
Entries = dict[str, dict[str, Any]]
"""`sha256` and length in `bytes` of each file, by file name."""


def entries(paths: list[Path]) -> Entries:
    """Return the manifest entries of some files."""
    return {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(paths)}


def write(folder: Path, step: int, files: Entries) -> None:
    """Write the manifest of a checkpoint. Afterwards the checkpoint counts as complete."""
    write_synced(folder / NAME, _add_hash({"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}))


def file_names(folder: Path) -> set[str]:
    """Return the file names in the manifest of a checkpoint. The manifest is not verified."""
    return set(json.loads((folder / NAME).read_bytes())["files"])


def parse(manifest_bytes: bytes) -> Entries:
    """Verify the hash of a manifest, and return its entries.

    Raises:
        ValueError: the manifest is damaged, or names a file outside the checkpoint's folder.
    """
    try:
        content = json.loads(manifest_bytes)
        del content["sha256"]
        files = {name: {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for name, e in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is damaged: {type(error).__name__}: {error}") from error
    if _add_hash(content) != manifest_bytes:
        raise ValueError(f"{NAME} does not have the content that was written")
    if outside := [name for name in files if Path(name).name != name or name == NAME]:
        raise ValueError(f"{NAME} names files that a checkpoint cannot have: {outside}")
    return files


def find_damage(folder: Path) -> str | None:
    """Compare the files of a checkpoint with its manifest. Return a message about the first damaged file, or None."""
    try:
        for name, entry in parse((folder / NAME).read_bytes()).items():
            if _sha256(folder / name) != entry["sha256"]:
                return f"{name} does not have the content that was written"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add_hash(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as JSON, with the SHA-256 of the other fields added."""
    return encode_json(manifest | {"sha256": hashlib.sha256(encode_json(manifest)).hexdigest()})
