"""Checkpoints on disk: written atomically, hashed, and verified before they are read.

A checkpoint is written into a hidden folder, and each file is synced to disk. The manifest, with the SHA-256 of each
file, is written last. Then the folder is renamed. So every folder `step_…` with a `manifest.json` is complete.

With several ranks, only rank 0 creates, renames and removes folders. All ranks receive its result or its error. All
ranks must use the same folder on a shared file system.
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
from wmtp.errors import InputError
from wmtp.field_types import Positive
from wmtp.runtime.atomic_files import encode_json, fsync_path, replace_atomically, write_synced

__all__ = ["CheckpointStore", "find_damage", "load"]
log = logging.getLogger(__name__)
STAGING, REMOVED = ".staging-", ".removed-"
"""Name prefixes of the folder of a checkpoint while it is written, and while it is removed."""
REPLACED = ".replaced"
"""Name suffix of a checkpoint while a new one of the same step replaces it. Still a valid checkpoint."""
STATE = "state.json"


class CheckpointStore:
    """Checkpoints of one stage on disk: the `keep_last` newest checkpoints, and the best.

    All ranks must call every method. Without `processes`, only this process uses the store. Such a store is read-only
    except for `save`, because a training run may use the same folder at the same time.
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
            folder: folder of the run or of stage 1; checkpoints are in its subfolder `checkpoints`.
            processes: the process group whose ranks call the methods.
            keep_last: number of the newest checkpoints to keep.
            format: `whole` for full tensors written by rank 0, `sharded` for shards written by every rank.
        """
        self.folder = folder / "checkpoints"
        self.is_read_only = processes is None
        self.processes = processes or Processes.single_process()
        self.keep_last, self.format = keep_last, format

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write the checkpoint of a step, update latest.json, and delete superseded checkpoints.

        Tensors may be the live tensors of the training, and may be sharded over the ranks. If one rank fails, all ranks
        raise an error, and the earlier checkpoints are unchanged.

        Returns:
            The folder of the checkpoint.

        Raises:
            TypeError: the state is not plain JSON; nothing was written.
            OtherProcessFailed: another rank failed.
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

    def mark_best(self, step: int, value: float) -> None:
        """Mark the checkpoint of a step as the best, if it exists. The best checkpoint is never deleted."""
        self.processes.run_on_main(lambda: self._mark_best(step, value))

    def best(self) -> Path | None:
        """Return the best checkpoint, or None if no checkpoint is marked as the best or it does not exist."""
        return self._path_of(self.processes.run_on_main(self._best))

    def has_any(self) -> bool:
        """Return whether there is a checkpoint, damaged or not."""
        return self.processes.run_on_main(lambda: any(self.folder.glob(f"step_*/{manifest.NAME}")))

    def latest(self) -> Path:
        """Verify checkpoints, newest first, and return the first undamaged one.

        Damaged checkpoints are renamed, with a warning. A read-only store renames nothing.

        Raises:
            InputError: there is no undamaged checkpoint. Raised on rank 0.
            OtherProcessFailed: there is no undamaged checkpoint. Raised on the other ranks.
        """
        path = self._path_of(self.processes.run_on_main(self._latest))
        assert path is not None
        return path

    def prune(self) -> None:
        """Delete superseded checkpoints on rank 0; the other ranks do not wait."""
        if self.processes.is_main:
            self._prune()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _path_of(self, name: str | None) -> Path | None:
        return None if name is None else self.folder / name

    def _list(self) -> list[Path]:
        """Return all checkpoint folders, oldest first. A checkpoint that is being replaced precedes its replacement."""
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

    def _mark_best(self, step: int, value: float) -> None:
        name = self._path(step).name
        if (self.folder / name).exists():
            self._write_pointer("best", {"folder": name, "step": step, "val/loss": value})
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
        """Remove files that interrupted saves and removals left, and complete interrupted replacements."""
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
        """Return the checkpoints that may be deleted, oldest first."""
        return [path for path in self._list()[: -self.keep_last] if path.name != best]

    def _remove(self, path: Path) -> None:
        """Remove a folder if it exists. It is renamed first, so that a partly removed folder is never used."""
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
        like: live parameters. A stored tensor of a sharded parameter is returned as this rank's shard. Every other
            tensor is returned as a full tensor on the CPU.
        verified: True to skip the verification, for a checkpoint that `latest` has just returned.
        optimizer: read the optimizer's tensors, too.
        processes: the process group whose ranks call this function; by default the group of this process.

    Raises:
        InputError: the checkpoint is damaged or does not exist. Raised on rank 0.
        OtherProcessFailed: the checkpoint is damaged or does not exist. Raised on the other ranks.
    """
    processes = processes or Processes()
    if not verified:
        problem = processes.run_on_main(lambda: find_damage(path))
        if problem is not None:
            raise InputError(f"{path}: no complete checkpoint: {problem}")
    return processes.run_on_all(lambda: _read(path, like or {}, optimizer))


def _read(path: Path, like: Mapping[str, Tensor], optimizer: bool) -> Snapshot:
    read = formats.read_sharded if INDEX in manifest.file_names(path) else formats.read_full
    return Snapshot(*read(path, like, optimizer=optimizer), json.loads((path / STATE).read_bytes()))
