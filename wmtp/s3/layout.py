"""Which files of a run are uploaded, and the marker file of an uploaded checkpoint."""

import json
from collections.abc import Container
from pathlib import Path

from wmtp.checkpoint.listing import complete_checkpoints, manifest_hash, read_pointer
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import PROVENANCE, RESUMES, RUN, SAVED_OVERRIDES, SYNC_STATE

MARKER = "uploaded.json"
STAGES = ("pretrain/", "")
"""Folders of the two stages within a run. Stage 1 comes first, since stage 2 cannot be resumed without it."""
RECORDS = (
    RUN, "config.yaml", PROVENANCE, SYNC_STATE, "metrics.jsonl", "samples.jsonl", RESUMES, ".hydra/*.yaml",
    str(SAVED_OVERRIDES), "system.jsonl", "pretrain/config.yaml", "pretrain/metrics.jsonl",
    "pretrain/value_head.safetensors", "model/*", "pretrain/model/*",
)  # fmt: skip
"""Files sent before each checkpoint, so that a visible checkpoint always has its config and metrics."""
FINAL_FILES = ("summary.json", "report.html", "train.log")
"""Files sent when the run ends."""
STAGE1_RESULT = "pretrain/result.json"
"""Result of stage 1. It names a checkpoint and is sent after that checkpoint."""


def mark_uploaded(checkpoint: Path, url: str) -> None:
    """Write the marker file into a checkpoint that is completely uploaded to a run's URL."""
    replace_atomically(checkpoint / MARKER, encode_json({"url": url, "manifest": manifest_hash(checkpoint)}))


def is_uploaded(checkpoint: Path, url: str | None) -> bool:
    """Return whether the current content of a checkpoint is uploaded to a run's URL."""
    try:
        marker = json.loads((checkpoint / MARKER).read_bytes())
        return bool(marker["url"] == url and marker["manifest"] == manifest_hash(checkpoint))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def to_upload(folder: Path, keep_last: int, damaged: Container[Path] = ()) -> list[Path]:
    """Return the checkpoints of a run that S3 should hold, in upload order.

    These are the newest `keep_last` and the best of each stage, the newest first; `damaged` ones are ignored.
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


def pending(folder: Path, url: str, keep_last: int, damaged: Container[Path] = ()) -> list[Path]:
    """Return the checkpoints of `to_upload` that are not uploaded yet, in upload order."""
    return [path for path in to_upload(folder, keep_last, damaged) if not is_uploaded(path, url)]


def stage_of(folder: Path, checkpoint: Path) -> str:
    """Return the stage of a checkpoint of a run, one of `STAGES`."""
    stage = checkpoint.relative_to(folder).as_posix().partition("checkpoints/")[0]
    assert stage in STAGES, stage
    return stage
