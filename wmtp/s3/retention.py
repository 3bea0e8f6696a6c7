"""Delete old checkpoints in S3, and find the newest and the best checkpoint."""

import logging
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from wmtp.checkpoint import manifest
from wmtp.checkpoint.listing import STEP, read_pointer, step_of
from wmtp.errors import InputError
from wmtp.s3.client import S3Folder, StoreError
from wmtp.s3.layout import STAGES, checkpoints_to_upload, stage_of

log = logging.getLogger(__name__)


class RemotePruner:
    """Object that deletes the checkpoints of a run in S3 that are no longer needed."""

    def __init__(self, folder: Path, remote: S3Folder, keep_last: int) -> None:
        """Create the object. `keep_last` newest checkpoints of each stage are kept, and the best checkpoint."""
        self.folder, self.remote, self.keep_last = folder, remote, keep_last
        self._stages_to_prune = set(STAGES)

    def prune(self, changed: set[str]) -> None:
        """Delete the checkpoints in S3 that are no longer needed.

        If a deletion fails, a warning is logged. The next call repeats the deletion.

        Args:
            changed: path prefixes of the stages for which new data were uploaded.
        """
        for stage in sorted(changed | self._stages_to_prune):
            try:
                errors = self._delete_superseded(stage)
            except (StoreError, InputError) as error:
                errors = {stage: str(error)}
            if errors:
                self._stages_to_prune.add(stage)
                key, reason = next(iter(errors.items()))
                log.warning(
                    "%s: superseded checkpoints cannot be deleted yet: %s %s", self.remote.display_url, key, reason
                )
            else:
                self._stages_to_prune.discard(stage)

    def _delete_superseded(self, stage: str) -> dict[str, str]:
        try:
            best = read_pointer(self.folder / stage / "checkpoints" / "best.json")
        except (ValueError, KeyError, TypeError):
            return {}  # the best checkpoint is unknown, so delete nothing
        selected = checkpoints_to_upload(self.folder, self.keep_last)
        local = {path.name for path in selected if stage_of(self.folder, path) == stage}
        keep = local | {name for name in (best, read_remote_best(self.remote, stage)) if name is not None}
        return delete_superseded(self.remote, stage, self.keep_last, keep)


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
