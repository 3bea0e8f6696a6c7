"""The lock of a study: its options, data and code, written before its first run. Later changes are departures."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from wmtp.checkpoint.manifest import file_hash
from wmtp.config.values import validate_value
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.versions import versions
from wmtp.studies.options import StudyOptions
from wmtp.studies.plan import Plan

FILE_NAME = "study.lock.json"


@dataclass(frozen=True)
class StudyLock:
    """The options, the data and the code of a study, as they were before its first run."""

    name: str
    options: StudyOptions
    data: dict[str, dict[str, str]]
    """Fingerprints of the training, validation and test data and of the tokenizer of each arm."""
    configs: dict[str, dict[str, Any]]
    """Config values of each arm by dotted key, without those that differ between the runs of an arm."""
    models: dict[str, str]
    """SHA-256 of the weights of each preparation."""
    code: dict[str, Any]
    """Git revision, untracked files and versions of packages."""
    written: str
    """Time at which the lock was written."""
    sha256: str
    """Hash of everything above."""

    @property
    def is_intact(self) -> bool:
        """True if the content is the one that was hashed."""
        return self.sha256 == content_hash(_content(self))

    @property
    def is_complete(self) -> bool:
        """True if the lock contains the data of all arms, which are known after the preparations."""
        return self.data.keys() == self.options.arms.keys()

    @property
    def revision(self) -> str | None:
        """Git revision of the code, or None if it is not known."""
        return self.code.get("git_revision")


def new_lock(name: str, options: StudyOptions) -> StudyLock:
    """Return the lock of a study that begins now. It does not contain data yet."""
    written = datetime.now().astimezone().isoformat(timespec="seconds")
    return _hashed(StudyLock(name, options, {}, {}, {}, versions(), written, ""))


def complete_lock(
    lock: StudyLock,
    data: Mapping[str, dict[str, str]],
    configs: Mapping[str, dict[str, Any]],
    models: Mapping[str, str],
) -> StudyLock:
    """Return a lock with the data and the configs of all arms, and with the models of the preparations."""
    return _hashed(replace(lock, data=dict(data), configs=dict(configs), models=dict(models)))


def _hashed(lock: StudyLock) -> StudyLock:
    return replace(lock, sha256=content_hash(_content(lock)))


def _content(lock: StudyLock) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(encode_json(asdict(lock)))  # tuples become lists, as in the file
    del content["sha256"]
    return content


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain content, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_lock(folder: Path, lock: StudyLock) -> None:
    """Write the lock to the folder of a study."""
    replace_atomically(folder / FILE_NAME, encode_json(asdict(lock)))


def read_lock(folder: Path) -> StudyLock | None:
    """Return the lock in the folder of a study, or None if the folder has none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        lock: StudyLock = validate_value(StudyLock, json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: {' '.join(str(error).split())}") from error
    return lock


def model_hashes(plan: Plan) -> dict[str, str]:
    """Return the SHA-256 of the weights of each preparation: of its export, or of the manifest of its last checkpoint.

    The manifest contains the hashes of the files of the checkpoint.
    """
    found = {}
    for job in plan.preparations():
        if job.command == "export":
            name, files = job.folder.parent.name, sorted(job.folder.glob("*.safetensors"))
        else:
            name, files = job.folder.name, sorted(job.folder.glob("checkpoints/step_*/manifest.json"))[-1:]
        found[name] = ", ".join(file_hash(path) for path in files)
    return found


def changed_options(before: StudyOptions, now: StudyOptions) -> list[str]:
    """Return the names of the options that differ."""
    return [name for name, value in asdict(before).items() if asdict(now)[name] != value]
