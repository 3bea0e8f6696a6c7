"""What stays of a run's checkpoints in its bucket."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from wmtp.checkpoint import manifest
from wmtp.checkpoint.listing import STEP, step_of
from wmtp.s3.client import S3Folder


def delete_superseded(remote: S3Folder, stage: str, keep_last: int, keep: Collection[str]) -> dict[str, str]:
    """Delete the checkpoints of a stage but for the newest `keep_last` whole ones and those to `keep`.

    What is not whole goes too. Manifests go first, so that nobody takes what is left for a checkpoint.

    Returns:
        The keys of what could not be deleted, and why.
    """
    checkpoints: dict[str, list[str]] = defaultdict(list)
    for key, _ in remote.listed(f"{stage}checkpoints/step_"):
        name = key.removeprefix(f"{stage}checkpoints/").partition("/")[0]
        if STEP.fullmatch(name):
            checkpoints[name].append(key)
    whole = [name for name, keys in checkpoints.items() if _manifest(stage, name) in keys]
    stays = {*sorted(whole, key=lambda name: int(name[5:]))[-keep_last:], *keep}
    superseded = [name for name in checkpoints if name not in stays]
    manifests = [_manifest(stage, name) for name in superseded if name in whole]
    problems = remote.delete(manifests)
    rest = [key for name in superseded if _manifest(stage, name) not in problems for key in checkpoints[name]]
    return problems | remote.delete(key for key in rest if key not in manifests)


def newest_there(remote: S3Folder, stage: str) -> int:
    """The step of a stage's newest checkpoint in the bucket; 0 without one."""
    keys = (key.split("/") for key, _ in remote.listed(f"{stage}checkpoints/step_"))
    names = [name for *_, name, file in keys if file == manifest.NAME and STEP.fullmatch(name)]
    return max(map(step_of, names), default=0)


def noted_best(remote: S3Folder, stage: str) -> str | None:
    """The name of the checkpoint that the bucket's best.json speaks of. Raises `InputError` if it is damaged."""
    note: dict[str, Any] | None = remote.read_json(f"{stage}checkpoints/best.json")
    return None if note is None else str(note.get("folder"))


def _manifest(stage: str, name: str) -> str:
    return f"{stage}checkpoints/{name}/{manifest.NAME}"
