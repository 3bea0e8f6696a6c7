"""Hashes of the contents of data sets, by which data that were changed since a run are recognized."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from wmtp.data.records import Record, StdioTest
from wmtp.errors import InputError
from wmtp.runtime.run_dir import PROVENANCE

Contents = dict[str, dict[str, str]]
"""For each part of a data set, which is a file or a generated split, its `source` and the `hash` of its content."""


def hash_file(path: Path) -> str:
    """Return a hash of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_records(records: Iterable[Record]) -> str:
    """Return a hash of all fields of records. It does not change when the schema gets a further optional field.

    The tests of a problem may be large. Therefore they are hashed once, and not once for each of its solutions.
    """
    digest = hashlib.sha256()
    hashes: dict[tuple[str | StdioTest, ...], bytes] = {}
    for record in records:
        if record.tests not in hashes:
            tests = record.model_dump_json(include={"tests"})
            hashes[record.tests] = hashlib.sha256(tests.encode()).digest()
        others = record.model_dump_json(exclude_defaults=True, exclude={"tests"})
        digest.update(hashes[record.tests] + others.encode() + b"\n")
    return digest.hexdigest()


def recorded_contents(folder: Path) -> Contents | None:
    """Return the contents of the data that the run in a folder has used, or None if the run does not record them.

    Raises:
        InputError: the file in which they are recorded is damaged.
    """
    path = folder / PROVENANCE
    try:
        contents: Contents | None = json.loads(path.read_text())["data"].get("contents")
    except (FileNotFoundError, KeyError):
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is damaged: {error}") from error
    return contents


def content_changes(before: Contents, now: Contents) -> list[str]:
    """Return a line of text for each part whose content has changed. A part may have moved to another path."""
    lines = []
    for part in dict.fromkeys([*before, *now]):
        old, new = before.get(part), now.get(part)
        if new is None:
            assert old is not None
            lines.append(f"{old['source']} is missing")
        elif old is None:
            lines.append(f"{new['source']} was added")
        elif old["hash"] != new["hash"]:
            same = old["source"] == new["source"]
            lines.append(f"{new['source']} {'has changed' if same else 'differs from ' + old['source']}")
    return lines
