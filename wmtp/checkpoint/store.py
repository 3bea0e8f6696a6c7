"""Write checkpoints to disk atomically, and verify their hashes before they are read.

A checkpoint is written into a hidden folder, and each file is synced to disk. The manifest, which contains the SHA-256
of every other file, is written last. Then the folder is renamed. Therefore every folder `step_…` that contains a
`manifest.json` is complete.

If a run has several ranks, only rank 0 creates, renames and removes folders. All ranks receive the result or the error
of rank 0. All ranks must use the same folder on a shared file system.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from wmtp.checkpoint import formats, manifest
from wmtp.checkpoint.listing import read_pointer
from wmtp.checkpoint.manifest import Entries, find_damage
from wmtp.checkpoint.state import Snapshot
from wmtp.distributed.process_group import Processes
from wmtp.distributed.sharded_io import INDEX
from wmtp.errors import InputError, refuse_odd_content
from wmtp.field_types import Positive
from wmtp.runtime.atomic_files import encode_json, fsync_path, replace_atomically, write_synced

__all__ = ["CheckpointStore", "find_damage", "load"]
log = logging.getLogger(__name__)
STAGING, REMOVED = ".staging-", ".removed-"
"""Prefixes of the name of a checkpoint's folder: while the checkpoint is written, and while it is removed."""
REPLACED = ".replaced"
"""Suffix of the name of a valid checkpoint's folder while a new checkpoint of the same step replaces it."""
STATE = "state.json"


class CheckpointStore:
    """The checkpoints of one training stage on disk. The store keeps the `keep_last` newest checkpoints and the best.

    All ranks must call every method, except if the store was created without `processes`. In that case, only this
    process uses the store, and `latest` does not change the folder, because a training run may use it at the same time.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes | None = None,
        *,
        keep_last: Positive = 2,
        format: Literal["whole", "sharded"] = "whole",  # noqa: A002 - name of the config key
    ) -> None:
        """Create the store.

        Args:
            folder: folder of the run or of stage 1. The checkpoints are in its subfolder `checkpoints`.
            processes: the process group whose ranks call the methods; None if only this process uses the store.
            keep_last: number of newest checkpoints to keep. The best checkpoint is kept in addition.
            format: `whole` if rank 0 gathers and writes full tensors, `sharded` if every rank writes its shards of the
                tensors.
        """
        self.folder = folder / "checkpoints"
        self.is_read_only = processes is None
        self.processes = processes or Processes.single_process()
        self.keep_last, self.format = keep_last, format

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write the checkpoint of a step, update latest.json, and delete checkpoints that are no longer kept.

        The tensors of `snapshot` may share memory with the model and the optimizer, and they may be sharded over the
        ranks. If writing fails on one rank, all ranks raise an error, and the earlier checkpoints are unchanged.

        Returns:
            The folder of the checkpoint.

        Raises:
            TypeError: `snapshot.state` is not plain JSON. No checkpoint was written.
            OtherProcessFailed: writing failed on another rank.
        """
        final = self._path(step)
        staged = final.with_name(STAGING + final.name)
        try:
            self.processes.run_on_main(lambda: self._create_staged(staged, snapshot.state))
            write = formats.write_sharded if self.format == "sharded" else formats.write_full
            files = write(staged, snapshot, self.processes)
            self.processes.run_on_main(lambda: self._publish(staged, final, step, files))
        except BaseException:
            if self.processes.is_main:
                shutil.rmtree(staged, ignore_errors=True)  # if this fails, the next start removes it
            raise
        return final

    def mark_best(self, step: int, metrics: dict[str, float]) -> None:
        """Mark the checkpoint of a step as the best, if this checkpoint exists.

        The best checkpoint is never deleted. best.json contains `metrics`: its validation loss, and the metric by which
        it was chosen.
        """
        self.processes.run_on_main(lambda: self._mark_best(step, metrics))

    def best(self) -> Path | None:
        """Return the folder of the checkpoint that is marked as the best.

        The result is None if no checkpoint is marked, if the marked one does not exist, or if best.json is damaged.
        """
        return self._path_of(self.processes.run_on_main(self._best))

    def has_any(self) -> bool:
        """Return whether the store contains a checkpoint. A damaged checkpoint counts, too."""
        return self.processes.run_on_main(lambda: any(self.folder.glob(f"step_*/{manifest.NAME}")))

    def latest(self) -> Path:
        """Return the folder of the newest undamaged checkpoint.

        The method verifies the checkpoints from the newest to the oldest until one is undamaged. It logs a warning for
        each damaged checkpoint and renames its folder. A store that was created without `processes` renames nothing.

        Raises:
            InputError: there is no undamaged checkpoint (raised on rank 0).
            OtherProcessFailed: there is no undamaged checkpoint (raised on the other ranks).
        """
        path = self._path_of(self.processes.run_on_main(self._latest))
        assert path is not None
        return path

    def prune(self) -> None:
        """Delete the checkpoints that are no longer kept, on rank 0. The other ranks do not wait for the deletion."""
        if self.processes.is_main:
            self._prune()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _path_of(self, name: str | None) -> Path | None:
        return None if name is None else self.folder / name

    def _list(self) -> list[Path]:
        """Return all checkpoint folders, oldest first. A replaced checkpoint comes before the one that replaces it."""
        return sorted(
            self.folder.glob("step_*"), key=lambda path: (path.name.removesuffix(REPLACED), path.suffix != REPLACED)
        )

    def _create_staged(self, staged: Path, state: dict[str, Any]) -> None:
        encoded = encode_json(state)
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            fsync_path(self.folder.parent)
        self._clean_up()
        staged.mkdir()
        write_synced(staged / STATE, encoded)

    def _publish(self, staged: Path, final: Path, step: int, files: Entries) -> None:
        manifest.write(staged, step, files | manifest.entries([staged / STATE]))
        fsync_path(staged)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
        fsync_path(self.folder)
        self._write_pointer("latest", {"folder": final.name, "step": step})
        self._remove(replaced)
        self._prune()

    def _mark_best(self, step: int, metrics: dict[str, float]) -> None:
        name = self._path(step).name
        if (self.folder / name).exists():
            self._write_pointer("best", {"folder": name, "step": step, **metrics})
            self._prune()

    def _best(self) -> str | None:
        try:
            name = read_pointer(self.folder / "best.json")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s/best.json is damaged (%s); the best checkpoint is unknown", self.folder, error)
            return None
        return name if name is not None and (self.folder / name).exists() else None

    def _latest(self) -> str:
        if not self.is_read_only:
            self._clean_up()
        for path in reversed(self._list()):
            problem = find_damage(path)
            if problem is None:
                return path.name
            if self.is_read_only:
                log.warning("%s is damaged (%s); the previous one is used", path, problem)
            else:
                renamed = path.with_name(f"damaged-{path.name}")
                log.warning("%s is damaged (%s); renamed to %s, the previous one is used", path, problem, renamed.name)
                shutil.rmtree(renamed, ignore_errors=True)
                path.rename(renamed)
        raise InputError(f"{self.folder}: there is no complete checkpoint")

    def _write_pointer(self, name: str, content: dict[str, Any]) -> None:
        replace_atomically(self.folder / f"{name}.json", encode_json(content))

    def _clean_up(self) -> None:
        """Remove the files and folders that interrupted saves and removals left. Complete interrupted replacements."""
        for path in self.folder.glob(f"{STAGING}*"):
            log.warning("%s was left by an interrupted save; it is removed", path)
            self._remove(path)
        for path in self.folder.glob(f"{REMOVED}*"):
            log.info("%s was left by an interrupted removal; it is removed", path)
            self._remove(path)
        for path in self.folder.glob(".*.json.*.tmp"):
            path.unlink()
        for path in self.folder.glob(f"step_*{REPLACED}"):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                self._remove(path)
            else:
                path.rename(final)

    def _prune(self) -> None:
        try:
            best = read_pointer(self.folder / "best.json")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s/best.json is damaged (%s); no checkpoint is removed, since it may be the best",
                        self.folder, error)  # fmt: skip
            return
        for path in [*self.folder.glob(f"{REMOVED}*"), *self._superseded(best)]:
            self._remove(path)

    def _superseded(self, best: str | None) -> list[Path]:
        """Return the folders of the checkpoints that may be deleted, oldest first.

        Neither the `keep_last` newest checkpoints nor the checkpoint with the name `best` may be deleted.
        """
        return [path for path in self._list()[: -self.keep_last] if path.name != best]

    def _remove(self, path: Path) -> None:
        """Remove a folder if it exists. If this fails, log a warning.

        The folder is renamed first, so that a partly removed checkpoint is never used.
        """
        hidden = path if path.name.startswith(".") else path.with_name(REMOVED + path.name)
        try:
            if path.exists():
                path.rename(hidden)
                shutil.rmtree(hidden)
        except OSError as error:
            log.warning("%s cannot be removed: %s; this is tried again after the next save", path, error)


def load(
    path: Path,
    like: Mapping[str, Tensor] | None = None,
    *,
    verified: bool = False,
    optimizer: bool = True,
    processes: Processes | None = None,
) -> Snapshot:
    """Read a checkpoint. All ranks must call this function.

    Args:
        path: folder of the checkpoint.
        like: parameters of the model in memory, by name. If one of them is sharded, its stored tensors are returned
            as this rank's shards. Every other tensor is returned as a full tensor on the CPU.
        verified: True if the checkpoint has already been verified, for example by `CheckpointStore.latest`. Then this
            function does not verify it again.
        optimizer: True to read the tensors of the optimizer as well as those of the model.
        processes: the process group whose ranks call this function; by default the group of this process.

    Raises:
        InputError: the checkpoint is damaged or does not exist (raised on rank 0).
        OtherProcessFailed: the checkpoint is damaged or does not exist (raised on the other ranks).
    """
    processes = processes or Processes()
    if not verified:
        problem = processes.run_on_main(lambda: find_damage(path))
        if problem is not None:
            raise InputError(f"{path}: no complete checkpoint: {problem}")
    return processes.run_on_all(lambda: _read(path, like or {}, optimizer))


def _read(path: Path, like: Mapping[str, Tensor], optimizer: bool) -> Snapshot:
    read = formats.read_sharded if INDEX in manifest.file_names(path) else formats.read_full
    with refuse_odd_content(path):
        state = dict(json.loads((path / STATE).read_bytes()))
        return Snapshot(*read(path, like, optimizer=optimizer), state)
