"""Write the id and the S3 URL of a run, and the versions of its code and data."""

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
    """Write provenance.json: the code versions, overrides and data of the most recent start of a run.

    `changed` maps each key that the overrides changed to its default and its value.
    """
    data_info = {
        "name": data.name,
        "source": data.origin,
        "fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "train_fingerprint": data.train.fingerprint,
        "validation_fingerprint": data.validation.fingerprint,
        "train": len(data.train),
        "validation": len(data.validation),
    }
    content = {**versions(), "command": list(overrides), "changed": changed, "data": data_info}
    replace_atomically(folder / PROVENANCE, encode_json(content))


def write_run_id(folder: Path, remote: str | None) -> None:
    """Write run.json with the permanent id of the run and its URL below `remote`.

    With `remote` None, the run has no copy in S3.
    """
    run = read_run(folder)
    run_id = run["id"] if run else uuid.uuid4().hex
    before = run["remote"] if run else None
    after = None if remote is None else remote_url(folder, remote, before)
    if run is None or after != before:
        replace_atomically(folder / RUN, encode_json({"id": run_id, "remote": after}))


def remote_url(folder: Path, remote: str, before: str | None = None) -> str:
    """Return the URL of a run below `remote`.

    If `before`, the current URL of the run, is below `remote`, it is returned unchanged. Otherwise the URL is `remote`
    and the last components of the run's path, starting at the folder that is named by a date.
    """
    remote = remote.rstrip("/")
    if before is not None and before.startswith(f"{remote}/"):
        return before
    path = folder.resolve()
    start = next((n for n, part in enumerate(path.parts) if re.fullmatch(r"\d{4}-\d\d-\d\d", part)), None)
    if start is None:
        start = -2 if (path.parent / SWEEP).exists() else -1  # the folder of a sweep's job is named only by its number
    return f"{remote}/{'/'.join(path.parts[start:])}"
