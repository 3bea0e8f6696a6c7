"""The seal of a checkpoint: the SHA-256 of each of its files, checked before anything parses one of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from wmtp.runtime.files import encode_json, write_synced

NAME = "manifest.json"
FORMAT = 1
Entries = dict[str, dict[str, Any]]
"""Of each file, by name: its `sha256` and its length in `bytes`."""


def entries(paths: list[Path]) -> Entries:
    """What the manifest says of some files."""
    return {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(paths)}


def seal(folder: Path, step: int, files: Entries) -> None:
    """Write the manifest, with which a checkpoint is whole."""
    write_synced(folder / NAME, _sealed({"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}))


def files(folder: Path) -> set[str]:
    """The names of the files that a sound manifest speaks of."""
    return set(json.loads((folder / NAME).read_bytes())["files"])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, found before anything parses them; None if nothing is."""
    try:
        written = (folder / NAME).read_bytes()
        manifest = json.loads(written)
        del manifest["sha256"]
        if _sealed(manifest) != written:
            return f"{NAME} does not have the content that was written"
        for name, entry in manifest["files"].items():
            if _sha256(folder / name) != entry["sha256"]:
                return f"{name} does not have the content that was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest with a hash of its own."""
    return encode_json(manifest | {"sha256": hashlib.sha256(encode_json(manifest)).hexdigest()})
