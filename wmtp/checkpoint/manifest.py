"""The seal of a checkpoint: the SHA-256 of each of its files, checked before anything parses one of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from wmtp.runtime.atomic_files import encode_json, write_synced

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


def parsed(written: bytes) -> Entries:
    """What a manifest says of each file, once its own hash has been verified.

    Raises:
        ValueError: it is damaged, or names a file outside its folder.
    """
    try:
        content = json.loads(written)
        del content["sha256"]
        files = {name: {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for name, e in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is damaged: {type(error).__name__}: {error}") from error
    if _sealed(content) != written:
        raise ValueError(f"{NAME} does not have the content that was written")
    if outside := [name for name in files if Path(name).name != name or name == NAME]:
        raise ValueError(f"{NAME} speaks of files that no checkpoint has: {outside}")
    return files


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, found before anything parses them; None if nothing is."""
    try:
        for name, entry in parsed((folder / NAME).read_bytes()).items():
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


def _sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest with a hash of its own."""
    return encode_json(manifest | {"sha256": hashlib.sha256(encode_json(manifest)).hexdigest()})
