"""Delete old checkpoints in S3, and find the newest and the best checkpoint."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from wmtp.checkpoint import manifest
from wmtp.checkpoint.listing import STEP, step_of
from wmtp.s3.client import S3Folder


def delete_superseded(remote: S3Folder, stage: str, keep_last: int, keep: Collection[str]) -> dict[str, str]:
    """Delete the checkpoints of a stage in S3 that are no longer needed.

    The `keep_last` newest complete checkpoints and the checkpoints in `keep` are kept. All other checkpoints are
    deleted, including incomplete ones. The manifest of a checkpoint is deleted first, so that a partly deleted
    checkpoint is not mistaken for a complete one.

    Args:
        remote: folder of the run in S3.
        stage: path prefix of the stage, one of `STAGES`.
        keep_last: number of the newest checkpoints that are kept.
        keep: names of further checkpoints that are kept.

    Returns:
        A dictionary that maps each key that could not be deleted to its error code.
    """
    checkpoints: dict[str, list[str]] = defaultdict(list)
    for key, _ in remote.list_objects(f"{stage}checkpoints/step_"):
        name = key.removeprefix(f"{stage}checkpoints/").partition("/")[0]
        if STEP.fullmatch(name):
            checkpoints[name].append(key)
    complete = [name for name, keys in checkpoints.items() if _manifest_key(stage, name) in keys]
    kept = {*sorted(complete, key=lambda name: int(name[5:]))[-keep_last:], *keep}
    superseded = [name for name in checkpoints if name not in kept]
    manifests = [_manifest_key(stage, name) for name in superseded if name in complete]
    errors = remote.delete(manifests)
    rest = [key for name in superseded if _manifest_key(stage, name) not in errors for key in checkpoints[name]]
    return errors | remote.delete(key for key in rest if key not in manifests)


def newest_remote_step(remote: S3Folder, stage: str) -> int:
    """Return the step of a stage's newest complete checkpoint in S3, or 0 if S3 contains no complete checkpoint."""
    keys = (key.split("/") for key, _ in remote.list_objects(f"{stage}checkpoints/step_"))
    names = [name for *_, name, file in keys if file == manifest.NAME and STEP.fullmatch(name)]
    return max(map(step_of, names), default=0)


def read_remote_best(remote: S3Folder, stage: str) -> str | None:
    """Return the name of the checkpoint that a stage's best.json in S3 contains, or None if the file is missing.

    Raises:
        InputError: best.json is damaged.
    """
    pointer: dict[str, Any] | None = remote.read_json(f"{stage}checkpoints/best.json")
    return None if pointer is None else str(pointer.get("folder"))


def _manifest_key(stage: str, name: str) -> str:
    return f"{stage}checkpoints/{name}/{manifest.NAME}"
