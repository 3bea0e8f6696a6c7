"""What of a run is to lie in its bucket, and what says that a checkpoint does."""

import json
from collections.abc import Container
from pathlib import Path

from wmtp.checkpoint.listing import identity, noted, whole_checkpoints
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import ACCEPTED, PROVENANCE, RECEIPT, RESUMES, RUN

MARKER = "uploaded.json"
STAGES = ("pretrain/", "")
"""Where a run's stages have their checkpoints: the stage before, without which the training is of no use, first."""
RECORDS = (
    RUN, "config.yaml", PROVENANCE, RECEIPT, "metrics.jsonl", "samples.jsonl", RESUMES, ".hydra/*.yaml", str(ACCEPTED),
    "system.jsonl", "pretrain/config.yaml", "pretrain/metrics.jsonl", "pretrain/value_head.safetensors",
    "model/*", "pretrain/model/*",
)  # fmt: skip
"""What is sent before a checkpoint, so that whoever sees one also sees what led to it."""
CONCLUSIONS = ("summary.json", "report.html", "train.log")
RESULT = "pretrain/result.json"
"""Says which checkpoint the stage before left, and is sent after that."""


def mark_uploaded(checkpoint: Path, url: str) -> None:
    """Note in a checkpoint that all of it lies in a run's place in S3."""
    replace_atomically(checkpoint / MARKER, encode_json({"url": url, "manifest": identity(checkpoint)}))


def is_uploaded(checkpoint: Path, url: str | None) -> bool:
    """Whether a checkpoint, as it is now, lies in a run's place in S3."""
    try:
        marker = json.loads((checkpoint / MARKER).read_bytes())
        return bool(marker["url"] == url and marker["manifest"] == identity(checkpoint))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def wanted(folder: Path, keep_last: int, unsound: Container[Path] = ()) -> list[Path]:
    """The checkpoints of a run that are to lie in its place in S3, in the order in which they are to be sent.

    Of each stage the newest `keep_last` and the best, the newest first; the `unsound` do not count.
    """
    found: list[Path] = []
    for stage in STAGES:
        paths = [path for path in whole_checkpoints(folder / stage) if path not in unsound]
        try:
            best = noted(folder / stage / "checkpoints" / "best.json")
        except (ValueError, KeyError, TypeError):  # which the store that keeps it has said
            best = None
        found += [path for path in reversed(paths) if path in paths[-keep_last:] or path.name == best]
    return found


def pending(folder: Path, url: str, keep_last: int, unsound: Container[Path] = ()) -> list[Path]:
    """Those of the wanted checkpoints that do not lie in S3 yet, in the order in which they are to be sent."""
    return [path for path in wanted(folder, keep_last, unsound) if not is_uploaded(path, url)]


def stage_of(folder: Path, checkpoint: Path) -> str:
    """The stage that a checkpoint of a run belongs to."""
    stage = checkpoint.relative_to(folder).as_posix().partition("checkpoints/")[0]
    assert stage in STAGES, stage
    return stage
