"""Upload the checkpoints and other files of a run to S3 in a background thread, while training writes them."""

import logging
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from wmtp.checkpoint import manifest
from wmtp.checkpoint.listing import read_pointer
from wmtp.errors import InputError, PendingError
from wmtp.runtime.atomic_files import folder_size, read_or_none
from wmtp.runtime.background import SHUTDOWN_LIMIT_S, SHUTDOWN_STALL_S, BackgroundSender, format_error
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import display_path
from wmtp.s3.client import LocalFileError, S3Folder, StoreError, StoreUnreachable
from wmtp.s3.layout import (
    FINAL_FILES,
    RECORDS,
    STAGES,
    checkpoints_to_upload,
    mark_uploaded,
    pending_checkpoints,
    stage_of,
)
from wmtp.s3.options import S3Settings
from wmtp.s3.progress import TransferProgress
from wmtp.s3.retention import delete_superseded, read_remote_best
from wmtp.s3.run_files import RunFilesUploader

log = logging.getLogger(__name__)
LOCK = Path(".hydra") / "upload.lock"


class CheckpointUploader:
    """Uploader that copies a run to S3 in a background thread.

    The manifest of a checkpoint is uploaded last. A checkpoint without a manifest is ignored, so an incomplete
    checkpoint is never used. Only one process at a time uploads a run. Other processes wait until this upload ends.
    """

    poll_seconds = 1.0
    """Seconds between two searches for new files."""

    def __init__(
        self,
        folder: Path,
        url: str,
        settings: S3Settings,
        keep_last: int,
        console: Console | None = None,
        is_training: bool = True,
    ) -> None:
        """Start the background thread.

        Args:
            folder: the run's folder.
            url: S3 URL of the run.
            settings: settings of the store, and the time limits of `close`.
            keep_last: number of the newest checkpoints of each stage that S3 keeps. The best checkpoint is also kept.
            console: console on which `close` shows the progress. None shows no progress.
            is_training: True if this process trains the run. If it is False, `close_seconds` has no effect.

        Raises:
            InputError: a setting is not valid.
        """
        self.folder, self.remote, self.settings = folder, S3Folder(url, settings), settings
        self.keep_last, self.console, self.is_training = keep_last, console, is_training
        self.uploaded: list[str] = []
        """Paths of the checkpoints that this uploader has uploaded. They are relative to the run's folder."""
        self._damaged: dict[Path, bytes] = {}
        self._sender = BackgroundSender(self.server, self._upload)
        self._files = RunFilesUploader(folder, self.remote, self._send, self._sender.retry)
        self._bytes_sent = self._bytes_of_current = 0
        self._current_key = ""
        self._stages_to_prune = set(STAGES)
        self._waits_for_lock = False
        self._sender.start()

    @property
    def server(self) -> str:
        """URL of the run in S3, for use in messages."""
        return self.remote.display_url

    @property
    def report(self) -> str:
        """Message that says how many checkpoints and other files were uploaded."""
        num_checkpoints, num_files = len(self.uploaded), self._files.num_sent
        if not num_checkpoints and not num_files:
            return f"{self.remote.url}: nothing was missing"
        checkpoints = f"{num_checkpoints} checkpoint{'' if num_checkpoints == 1 else 's'}"
        return f"{checkpoints} and {num_files} other file{'' if num_files == 1 else 's'} sent to {self.remote.url}"

    def close(self, state: str) -> None:
        """Wait until all data of the run are uploaded, or until a time limit of the settings is reached.

        Args:
            state: final state of the run. If this process trained the run and `state` is not FINISHED, the time limits
                are shorter.

        Raises:
            PendingError: some data were not uploaded.
        """
        limit, stall = self.settings.close_seconds if self.is_training else math.inf, self.settings.stall_seconds
        if self.is_training and state != "FINISHED":
            limit, stall = min(SHUTDOWN_LIMIT_S, limit), min(SHUTDOWN_STALL_S, stall)
        before = self._bytes_sent
        to_send = sum(map(folder_size, self._pending())) - self._bytes_of_current
        with TransferProgress(self.console, f"uploading to {self.remote.url}") as progress:
            for _ in self._sender.drain(stall, limit):
                if to_send > 0:
                    progress.update(self._bytes_sent - before, to_send, self._current_key)
            if self._pending() or not self._sender.is_done:
                raise PendingError(self.unsent())

    def unsent(self) -> str:
        """Return a message about the data that were not uploaded.

        The message contains the number of checkpoints, the run's folder, the reason, and a command that uploads them.
        """
        total = len(checkpoints_to_upload(self.folder, self.keep_last, self._damaged_checkpoints()))
        num_pending, folder = len(self._pending()), display_path(self.folder)
        error = self._sender.last_error
        reason = format_error(error) if error is not None else "waiting ended before they were sent"
        if self._waits_for_lock:
            reason = "another process is still uploading this run"
        rest = "the rest is" if num_pending else "but other files of the run are pending; they are"
        return (
            f"{total - num_pending} of {total} checkpoints uploaded to {self.remote.display_url}, {rest} in {folder}: "
            f"{reason.rstrip('.')}. `python -m wmtp.sync {shlex.quote(folder)}` uploads them"
        )

    def _upload(self) -> None:
        """Upload new checkpoints and changed files until the run ends. This method runs in the background thread."""
        with self._upload_lock():
            self._abort_interrupted_uploads()
            self._files.send_changed(RECORDS)
            while True:
                # This is read before the search for new data, so that the last search begins after the run has ended.
                is_last = self._sender.is_closing
                self._send_new()
                if is_last:
                    break
                self._sender.wait(self.poll_seconds)
            self._files.send_changed(RECORDS + FINAL_FILES)
            if self.uploaded:
                self._prune(set())

    @contextmanager
    def _upload_lock(self) -> Iterator[None]:
        """Hold a lock while the context is active, so that no other process uploads this run at the same time."""

        def _should_give_up() -> bool:
            """Return whether to stop waiting for the lock."""
            if not self._waits_for_lock:
                log.warning("%s: another process is uploading this run; waiting for it", self.folder)
            self._waits_for_lock = True
            return self._sender.is_cancelled

        with file_lock(self.folder / LOCK, _should_give_up):
            self._waits_for_lock = False
            yield

    def _abort_interrupted_uploads(self) -> None:
        """Abort unfinished multipart uploads that a killed process left in S3.

        If the store does not allow this, a warning is logged.
        """

        def _abort() -> int:
            """Abort unfinished uploads, and return their number; return 0 if the store does not allow it."""
            try:
                return self.remote.abort_uploads()
            except StoreUnreachable:
                raise
            except (StoreError, InputError) as error:
                log.warning("interrupted uploads cannot be removed from the store: %s", error)
                return 0

        if count := self._sender.retry(_abort):
            log.info("%s: %d interrupted uploads were removed", self.remote.display_url, count)

    def _send_new(self) -> None:
        """Upload new checkpoints and changed pointer files. Delete checkpoints in S3 that are no longer needed."""
        while True:
            path = next(iter(self._pending()), None)
            if path is not None:
                self._files.send_changed(RECORDS)
                self._send_checkpoint(path)
            changed = self._files.send_pointers()
            if path is not None:
                changed.add(stage_of(self.folder, path))
            if changed:
                self._prune(changed)
            if path is None:
                return

    def _pending(self) -> list[Path]:
        return pending_checkpoints(self.folder, self.remote.url, self.keep_last, self._damaged_checkpoints())

    def _damaged_checkpoints(self) -> set[Path]:
        """Return the local checkpoints that were found damaged during an upload and did not change since then."""
        return {path for path, damaged in self._damaged.items() if read_or_none(path / manifest.NAME) == damaged}

    def _send_checkpoint(self, path: Path) -> None:
        """Upload a checkpoint. If it is damaged, log a warning and do not try to upload it again."""
        self._current_key = key = path.relative_to(self.folder).as_posix()
        manifest_bytes = read_or_none(path / manifest.NAME)
        if manifest_bytes is None:
            return  # the checkpoint was deleted in the meantime
        try:
            self._send_files(path, key, manifest_bytes)
        except LocalFileError as error:
            if read_or_none(path / manifest.NAME) == manifest_bytes:
                self._damaged[path] = manifest_bytes
                log.warning("%s is damaged and is not uploaded: %s", path, error)
        finally:
            self._current_key, self._bytes_of_current = "", 0

    def _send_files(self, path: Path, key: str, manifest_bytes: bytes) -> None:
        try:
            files = manifest.parse(manifest_bytes)
        except ValueError as error:
            raise LocalFileError(str(error)) from error
        remote_manifest = self._sender.retry(self.remote.get, f"{key}/{manifest.NAME}")
        if remote_manifest != manifest_bytes:
            if remote_manifest is not None:  # S3 has another checkpoint of the same step
                self._sender.retry(self._delete, f"{key}/{manifest.NAME}")
            for name, entry in files.items():
                self._send(path / name, f"{key}/{name}", entry["sha256"])
            self._sender.retry(self.remote.put_bytes, manifest_bytes, f"{key}/{manifest.NAME}")
            self.uploaded.append(key)
        self._sender.retry(self._mark_uploaded, path, manifest_bytes)

    def _mark_uploaded(self, path: Path, manifest_bytes: bytes) -> None:
        if read_or_none(path / manifest.NAME) == manifest_bytes:
            with suppress(FileNotFoundError):  # the checkpoint was deleted in the meantime
                mark_uploaded(path, self.remote.url)

    def _delete(self, key: str) -> None:
        if errors := self.remote.delete([key]):
            raise StoreError(f"{self.remote.display_url}: {key} cannot be deleted: {errors[key]}")

    def _send(self, path: Path, key: str, sha256: str | None = None) -> None:
        def _put() -> LocalFileError | None:
            """Upload the file, and return an error of the file instead of raising it."""
            retry = self._sender.retry
            try:
                self.remote.put(path, key, sha256=sha256, retry=retry, on_progress=self._count_bytes)
            except LocalFileError as error:  # returned instead of raised, because a retry is useless
                return error
            return None

        error = self._sender.retry(_put)
        if error is not None:
            raise error

    def _count_bytes(self, count: int) -> None:
        self._bytes_sent += count
        self._bytes_of_current += count if self._current_key else 0
        self._sender.heartbeat()

    def _prune(self, changed: set[str]) -> None:
        """Delete the checkpoints in S3 that are no longer needed.

        If a deletion fails, a warning is logged. The deletion is repeated after the next upload.

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
