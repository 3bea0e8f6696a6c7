"""Checkpoints on disk: atomic, hashed, and never unpickled before they are verified.

A checkpoint is staged in a hidden folder, put on the disk file by file, sealed by a manifest with the
SHA-256 of each file, and renamed into place. Whoever finds `step_…/manifest.json` finds a whole one.
Of several processes the main one alone touches names and folders, and all learn what came of it; their
folder must be the same one.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from wmtp.checkpoint import formats, manifest
from wmtp.checkpoint.listing import noted
from wmtp.checkpoint.manifest import Entries, damage
from wmtp.checkpoint.state import Snapshot
from wmtp.distributed.process_group import Processes
from wmtp.distributed.sharded_io import INDEX
from wmtp.errors import InputError
from wmtp.field_types import Positive
from wmtp.runtime.atomic_files import encode_json, replace_atomically, sync, write_synced

__all__ = ["CheckpointStore", "damage", "load"]
log = logging.getLogger(__name__)
STAGING, REMOVED = ".staging-", ".removed-"
REPLACED = ".replaced"
"""Ends the name of a checkpoint while a new one of the same step takes its place. It is as good as any other."""
STATE = "state.json"


class CheckpointStore:
    """The checkpoints of one run: the last `keep_last`, and the best.

    Every method must be called by all of the processes. Without any, this one is alone and looks on: it changes
    nothing but by saving, since a training may be using the same folder.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes | None = None,
        *,
        keep_last: Positive = 2,
        format: Literal["whole", "sharded"] = "whole",  # noqa: A002 - the config's word
    ) -> None:
        """`format` is how tensors are written: `whole` by the main process, or `sharded`, by each its parts."""
        self.folder = folder / "checkpoints"
        self.owns = processes is not None
        self.processes = processes or Processes.alone()
        self.keep_last, self.format = keep_last, format

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write the checkpoint of a step, note it as the latest, and prune.

        The tensors may be live, and parts of what the processes hold together. If anything fails in any process it
        has failed in all; the checkpoints before are as they were.

        Raises:
            TypeError: the state holds something that is not plain JSON; nothing was written then.
            OtherProcessFailed: in the processes that did their part when another could not.
        """
        final = self._path(step)
        staged = final.with_name(STAGING + final.name)
        try:
            self.processes.from_main(lambda: self._stage(staged, snapshot.state))
            write = formats.write_sharded if self.format == "sharded" else formats.write_full
            files = write(staged, snapshot, self.processes)
            self.processes.from_main(lambda: self._publish(staged, final, step, files))
        except BaseException:
            if self.processes.is_main:
                shutil.rmtree(staged, ignore_errors=True)  # what stays is removed at the next start
            raise
        return final

    def mark_best(self, step: int, value: float) -> None:
        """Note the checkpoint of a step as the best, if it is there; it is never pruned."""
        self.processes.from_main(lambda: self._mark_best(step, value))

    def best(self) -> Path | None:
        """The checkpoint that was marked as the best, if it is there."""
        return self._path_of(self.processes.from_main(self._best))

    def any(self) -> bool:
        """Whether there is a checkpoint at all, whole or not."""
        return self.processes.from_main(lambda: any(self.folder.glob(f"step_*/{manifest.NAME}")))

    def latest(self) -> Path:
        """The newest checkpoint that is whole, which is verified; damaged ones are named in a warning and passed over.

        Raises:
            InputError: there is none.
            OtherProcessFailed: the same, in the processes that are not the main one.
        """
        path = self._path_of(self.processes.from_main(self._latest))
        assert path is not None
        return path

    def prune(self) -> None:
        """Remove the checkpoints that need not stay any longer; the main process does, and the others do not wait."""
        if self.processes.is_main:
            self._prune()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _path_of(self, name: str | None) -> Path | None:
        return None if name is None else self.folder / name

    def _found(self) -> list[Path]:
        """The folders of all checkpoints, the oldest first; of one step that is being replaced, the new one last."""
        return sorted(
            self.folder.glob("step_*"), key=lambda path: (path.name.removesuffix(REPLACED), path.suffix != REPLACED)
        )

    def _stage(self, staged: Path, state: dict[str, Any]) -> None:
        encoded = encode_json(state)
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
        self._clear()
        staged.mkdir()
        write_synced(staged / STATE, encoded)

    def _publish(self, staged: Path, final: Path, step: int, files: Entries) -> None:
        manifest.seal(staged, step, files | manifest.entries([staged / STATE]))
        sync(staged)
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
        sync(self.folder)
        self._note("latest", {"folder": final.name, "step": step})
        self._discard(replaced)
        self._prune()

    def _mark_best(self, step: int, value: float) -> None:
        name = self._path(step).name
        if (self.folder / name).exists():
            self._note("best", {"folder": name, "step": step, "val/loss": value})
            self._prune()

    def _best(self) -> str | None:
        try:
            name = noted(self.folder / "best.json")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s/best.json is damaged (%s); which checkpoint is the best is not known", self.folder, error)
            return None
        return name if name is not None and (self.folder / name).exists() else None

    def _latest(self) -> str:
        if self.owns:
            self._clear()
        for path in reversed(self._found()):
            problem = damage(path)
            if problem is None:
                return path.name
            if self.owns:
                aside = path.with_name(f"damaged-{path.name}")
                log.warning("%s is damaged (%s); set aside as %s, the one before is used", path, problem, aside.name)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            else:
                log.warning("%s is damaged (%s); the one before is used", path, problem)
        raise InputError(f"{self.folder}: no whole checkpoint is there")

    def _note(self, name: str, content: dict[str, Any]) -> None:
        replace_atomically(self.folder / f"{name}.json", encode_json(content))

    def _clear(self) -> None:
        """Remove what a save or a clean-up left when it was interrupted, and finish putting one in another's place."""
        for path in self.folder.glob(f"{STAGING}*"):
            log.warning("%s was left by a save that was interrupted; it is removed", path)
            self._discard(path)
        for path in self.folder.glob(f"{REMOVED}*"):
            log.info("%s was left by a removal that was interrupted; it is removed", path)
            self._discard(path)
        for path in self.folder.glob(".*.json.*.tmp"):
            path.unlink()
        for path in self.folder.glob(f"step_*{REPLACED}"):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                self._discard(path)
            else:
                path.rename(final)

    def _prune(self) -> None:
        try:
            best = noted(self.folder / "best.json")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s/best.json is damaged (%s); no checkpoint is removed, as any may be it", self.folder, error)
            return
        for path in [*self.folder.glob(f"{REMOVED}*"), *self._superseded(best)]:
            self._discard(path)

    def _superseded(self, best: str | None) -> list[Path]:
        """The checkpoints that may go, the oldest first."""
        return [path for path in self._found()[: -self.keep_last] if path.name != best]

    def _discard(self, path: Path) -> None:
        """Remove a folder, if it is there: first from sight, so that no one takes half of it for a checkpoint."""
        hidden = path if path.name.startswith(".") else path.with_name(REMOVED + path.name)
        try:
            if path.exists():
                path.rename(hidden)
                shutil.rmtree(hidden)
        except OSError as error:
            log.warning("%s cannot be removed: %s; it is tried again after the next save", path, error)


def load(
    path: Path,
    like: Mapping[str, Tensor] | None = None,
    *,
    verified: bool = False,
    optimizer: bool = True,
    processes: Processes | None = None,
) -> Snapshot:
    """Read a checkpoint; to be called by all processes, by default those of the whole group.

    Where `like` has a live parameter that is spread over the processes, what is stored of it comes as this process's
    part; all else comes whole, on the CPU. A checkpoint that `latest` has just given is `verified`; any other is
    verified here, by the main process, before anything parses it. Without `optimizer`, its tensors are left out.

    Raises:
        InputError: it is damaged or not there.
        OtherProcessFailed: the same, in the processes that are not the main one.
    """
    processes = processes or Processes()
    if not verified:
        problem = processes.from_main(lambda: damage(path))
        if problem is not None:
            raise InputError(f"{path}: no whole checkpoint: {problem}")
    return processes.together(lambda: _read(path, like or {}, optimizer))


def _read(path: Path, like: Mapping[str, Tensor], optimizer: bool) -> Snapshot:
    read = formats.read_sharded if INDEX in manifest.files(path) else formats.read_full
    return Snapshot(*read(path, like, optimizer=optimizer), json.loads((path / STATE).read_bytes()))
