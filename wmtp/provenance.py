"""Where a run comes from and where it goes: its identity, its code, its data, and its place in S3."""

import importlib.metadata
import platform
import re
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.data.dataset import Dataset
from wmtp.runtime.files import encode_json, replace_atomically
from wmtp.runtime.folder import PROVENANCE, RUN, SWEEP, read_run

PACKAGES = ("wmtp", "torch", "hydra-core", "numpy", "tokenizers", "safetensors", "mlflow")


def git_revision() -> str | None:
    """The commit of the source, with `+changes` if it is not clean; None where no repository tracks it."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed: the repository around it, if there is one, is somebody else's
    revision = git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and git("status", "--porcelain", "--untracked-files=no") else revision


def versions() -> dict[str, Any]:
    """Which code this is, and of which packages."""
    packages = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"git_revision": git_revision(), "versions": packages}


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
