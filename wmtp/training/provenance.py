"""Where a run comes from and where it goes: its identity, its code, its data, and its place in S3."""

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.data.dataset import Dataset
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import PROVENANCE, RUN, SWEEP, read_run
from wmtp.runtime.versions import versions


def write_provenance(folder: Path, overrides: Sequence[str], changed: dict[str, list[Any]], data: Dataset) -> None:
    """Write provenance.json: the code, the command's overrides and the data that a run was last started with.

    `changed` has the default and the value of each key that the overrides changed.
    """
    described = {
        "name": data.name,
        "source": data.origin,
        "fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "train_fingerprint": data.train.fingerprint,
        "validation_fingerprint": data.validation.fingerprint,
        "train": len(data.train),
        "validation": len(data.validation),
    }
    content = {**versions(), "command": list(overrides), "changed": changed, "data": described}
    replace_atomically(folder / PROVENANCE, encode_json(content))


def identify(folder: Path, remote: str | None) -> None:
    """Write run.json, with an id that is the run's for ever, and its place below `remote`, if it is to have one."""
    known = read_run(folder)
    identity = known["id"] if known else uuid.uuid4().hex
    before = known["remote"] if known else None
    after = None if remote is None else place(folder, remote, before)
    if known is None or after != before:
        replace_atomically(folder / RUN, encode_json({"id": identity, "remote": after}))


def place(folder: Path, remote: str, before: str | None = None) -> str:
    """Where below `remote` a run is kept: where it was, or under the name that its folder has in outputs/."""
    remote = remote.rstrip("/")
    if before is not None and before.startswith(f"{remote}/"):
        return before
    path = folder.resolve()
    dated = next((n for n, part in enumerate(path.parts) if re.fullmatch(r"\d{4}-\d\d-\d\d", part)), None)
    if dated is None:
        dated = -2 if (path.parent / SWEEP).exists() else -1  # a job's name is only its number
    return f"{remote}/{'/'.join(path.parts[dated:])}"
