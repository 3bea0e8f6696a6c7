"""Write the id of a run, the S3 URL of its copy, and the versions of its code and data."""

import logging
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.data.contents import hash_records
from wmtp.data.dataset import Dataset
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import PROVENANCE, RUN, SWEEP, read_run
from wmtp.runtime.versions import versions

log = logging.getLogger(__name__)


def write_provenance(folder: Path, overrides: Sequence[str], changed: dict[str, list[Any]], data: Dataset) -> None:
    """Write provenance.json, which contains the code versions, the overrides and the data of a run.

    For each key that the overrides changed, `changed` contains a list with the default value and the new value. If a
    run is resumed, the file is written again.
    """
    data_info = {
        "name": data.name,
        "source": data.origin,
        "fingerprint": data.fingerprint,
        **split_fingerprints(data),
        "contents": data.contents,
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
    }
    found = versions()
    if untracked := found.get("untracked"):
        names = ", ".join(untracked["files"])
        log.warning("git does not track these files, whose hash is in provenance.json: %s", names)
    content = {**found, "command": list(overrides), "changed": changed, "data": data_info}
    replace_atomically(folder / PROVENANCE, encode_json(content))


def split_fingerprints(data: Dataset) -> dict[str, str]:
    """Return the hashes that identify the splits of a data set and its tokenizer."""
    return {
        "tokenizer": data.tokenizer.fingerprint,
        "train_fingerprint": data.train.fingerprint,
        "validation_fingerprint": data.validation.fingerprint,
        "test_fingerprint": hash_records(data.test),
    }


def write_run_id(folder: Path, remote: str | None) -> None:
    """Write run.json, which contains the permanent id of the run and the S3 URL of its copy.

    The URL starts with the URL `remote`. If `remote` is None, the run has no copy in S3.
    """
    run = read_run(folder)
    run_id = run["id"] if run else uuid.uuid4().hex
    before = run["remote"] if run else None
    after = None if remote is None else remote_url(folder, remote, before)
    if run is None or after != before:
        replace_atomically(folder / RUN, encode_json({"id": run_id, "remote": after}))


def remote_url(folder: Path, remote: str, current: str | None = None) -> str:
    """Return the S3 URL for the copy of a run, which starts with the URL `remote`.

    If `current`, the URL of an existing copy, starts with `remote`, it is returned unchanged. Otherwise the last
    components of the run's path are appended to `remote`, starting at the folder whose name is a date. If no folder is
    named by a date, only the name of the run's folder is appended. If the run is a job of a sweep, the name of the
    sweep's folder is also appended, before the name of the run's folder.
    """
    remote = remote.rstrip("/")
    if current is not None and current.startswith(f"{remote}/"):
        return current
    path = folder.resolve()
    start = next((n for n, part in enumerate(path.parts) if re.fullmatch(r"\d{4}-\d\d-\d\d", part)), None)
    if start is None:
        start = -2 if (path.parent / SWEEP).exists() else -1  # the folder of a sweep's job is named only by its number
    return f"{remote}/{'/'.join(path.parts[start:])}"
