"""Select the files and checkpoints of a run that are uploaded, and mark the checkpoints that were uploaded."""

import json
from collections.abc import Container
from pathlib import Path

from wmtp.checkpoint.listing import complete_checkpoints, read_pointer
from wmtp.checkpoint.manifest import manifest_hash
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import PROVENANCE, RESUMES, RUN, SAVED_OVERRIDES, SYNC_STATE

MARKER = "uploaded.json"
"""Name of the file in a checkpoint's folder that contains the S3 URL to which the checkpoint was uploaded."""
STAGES = ("pretrain/", "")
"""Path prefixes of stage 1 and stage 2 in the folder of a run. Stage 1 is first, because stage 2 needs its result."""
RECORDS = (
    RUN, "config.yaml", PROVENANCE, SYNC_STATE, "metrics.jsonl", "samples.jsonl", RESUMES, ".hydra/*.yaml",
    str(SAVED_OVERRIDES), "system.jsonl", "pretrain/config.yaml", "pretrain/metrics.jsonl",
    "pretrain/value_head.safetensors", "model/*", "pretrain/model/*",
)  # fmt: skip
"""Glob patterns of files that are uploaded before each checkpoint. So if a checkpoint is in S3, its config and metrics
are also in S3."""
FINAL_FILES = ("summary.json", "report.html", "train.log")
"""Names of files that are uploaded when the run ends."""
STAGE1_RESULT = "pretrain/result.json"
"""Path of the file with the result of stage 1. The file names a checkpoint, and is uploaded after this checkpoint."""


def mark_uploaded(checkpoint: Path, url: str) -> None:
    """Write a marker file that says that a checkpoint was uploaded. `url` is the S3 URL of the run."""
    replace_atomically(checkpoint / MARKER, encode_json({"url": url, "manifest": manifest_hash(checkpoint)}))


def uploaded_to(checkpoint: Path) -> str | None:
    """Return the S3 URL of the run to which the current content of a checkpoint was uploaded.

    Return None if this content was not uploaded.
    """
    try:
        marker = json.loads((checkpoint / MARKER).read_bytes())
        return str(marker["url"]) if marker["manifest"] == manifest_hash(checkpoint) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_uploaded(checkpoint: Path, url: str) -> bool:
    """Return whether the current content of a checkpoint was uploaded. `url` is the S3 URL of the run."""
    return uploaded_to(checkpoint) == url


def checkpoints_to_upload(folder: Path, keep_last: int, damaged: Container[Path] = ()) -> list[Path]:
    """Return the local checkpoints of a run that S3 should contain, in the order in which they are uploaded.

    The result contains, for each stage, the `keep_last` newest checkpoints and the best checkpoint, even if they were
    already uploaded. Checkpoints of stage 1 are first. Within a stage, newer checkpoints are first. Checkpoints in
    `damaged` are left out.
    """
    found: list[Path] = []
    for stage in STAGES:
        paths = [path for path in complete_checkpoints(folder / stage) if path not in damaged]
        try:
            best = read_pointer(folder / stage / "checkpoints" / "best.json")
        except (ValueError, KeyError, TypeError):  # the checkpoint store has already logged a warning
            best = None
        found += [path for path in reversed(paths) if path in paths[-keep_last:] or path.name == best]
    return found


def pending_checkpoints(folder: Path, url: str, keep_last: int, damaged: Container[Path] = ()) -> list[Path]:
    """Return the result of `checkpoints_to_upload` without the checkpoints that were already uploaded to `url`."""
    return [path for path in checkpoints_to_upload(folder, keep_last, damaged) if not is_uploaded(path, url)]


def stage_of(folder: Path, checkpoint: Path) -> str:
    """Return the path prefix of a checkpoint's stage. The result is one of `STAGES`. `folder` is the run's folder."""
    stage = checkpoint.relative_to(folder).as_posix().partition("checkpoints/")[0]
    assert stage in STAGES, stage
    return stage
