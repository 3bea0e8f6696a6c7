"""Copy a run's checkpoints and files to S3 in the background while they are written."""

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
from wmtp.field_types import Positive, PositiveFloat
from wmtp.runtime.atomic_files import folder_size, read_or_none
from wmtp.runtime.background import SHUTDOWN_LIMIT_S, SHUTDOWN_STALL_S, BackgroundSender, format_error
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import display_path
from wmtp.s3.client import LocalFileError, S3Folder, StoreError, StoreUnreachable
from wmtp.s3.layout import FINAL_FILES, RECORDS, STAGES, mark_uploaded, pending, stage_of, to_upload
from wmtp.s3.progress import TransferProgress
from wmtp.s3.retention import delete_superseded, read_remote_best
from wmtp.s3.run_files import RunFilesUploader

log = logging.getLogger(__name__)
LOCK = Path(".hydra") / "upload.lock"


class CheckpointUploader:
    """Uploader that keeps a copy of a run in S3, from a background thread.

    The manifest of a checkpoint is uploaded last and makes the checkpoint visible. Only one process at a time uploads
    a run; other processes wait for a lock.
    """

    poll_seconds = 1.0
    """Seconds between two searches for new files."""

    def __init__(
        self,
        folder: Path,
        remote: S3Folder,
        console: Console | None = None,
        is_training: bool = True,
        *,
        keep_last: Positive,
        stall_seconds: PositiveFloat,
        close_seconds: PositiveFloat,
    ) -> None:
        """Start uploading.

        Args:
            folder: the run's folder.
            remote: the run's S3 URL.
            console: shows the progress of uploads that `close` waits for.
            is_training: limit the time that `close` may wait, since the hardware may be reserved for others.
            keep_last: number of newest checkpoints of each stage that stay in S3, besides the best.
            stall_seconds: seconds that `close` waits for a store that does not respond.
            close_seconds: seconds that `close` waits for uploads that make progress.
        """
        self.folder, self.remote, self.console = folder, remote, console
        self.is_training, self.keep_last = is_training, keep_last
        self.stall_seconds, self.close_seconds = stall_seconds, close_seconds
        self.uploaded: list[str] = []
        """Checkpoints that were uploaded, as paths relative to the folder."""
        self._damaged: dict[Path, bytes] = {}
        self._sender = BackgroundSender(remote.where, self._upload)
        self._files = RunFilesUploader(folder, remote, self._send, self._sender.retry)
        self._bytes_sent = self._bytes_of_current = 0
        self._current = ""
        self._stages_to_prune = set(STAGES)
        self._waits_for_lock = False
        self._sender.start()

    @property
    def server(self) -> str:
        """The store, for messages."""
        return self.remote.where

    @property
    def report(self) -> str:
        """A description of the data that was sent."""
        num_checkpoints, num_files = len(self.uploaded), self._files.num_sent
        if not num_checkpoints and not num_files:
            return f"{self.remote.url}: nothing was missing"
        checkpoints = f"{num_checkpoints} checkpoint{'' if num_checkpoints == 1 else 's'}"
        return f"{checkpoints} and {num_files} other file{'' if num_files == 1 else 's'} sent to {self.remote.url}"

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Do nothing: metrics are uploaded together with the next checkpoint."""

    def close(self, state: str) -> None:
        """Wait until everything is uploaded, within the time limits.

        Raises:
            PendingError: something was not uploaded.
        """
        limit, stall = self.close_seconds if self.is_training else math.inf, self.stall_seconds
        if self.is_training and state != "FINISHED":
            limit, stall = min(SHUTDOWN_LIMIT_S, limit), min(SHUTDOWN_STALL_S, stall)
        before = self._bytes_sent
        to_send = sum(map(folder_size, self._pending())) - self._bytes_of_current
        with TransferProgress(self.console, f"uploading to {self.remote.url}") as progress:
            for _ in self._sender.drain(stall, limit):
                if to_send > 0:
                    progress.update(self._bytes_sent - before, to_send, self._current)
            if self._pending() or not self._sender.is_done:
                raise PendingError(self.unsent())

    def unsent(self) -> str:
        """Return a message about the data that was not uploaded: reason, location, and remedy."""
        total = len(to_upload(self.folder, self.keep_last, self._damaged_checkpoints()))
        num_pending, folder = len(self._pending()), display_path(self.folder)
        error = self._sender.last_error
        reason = format_error(error) if error is not None else "waiting ended before they were sent"
        if self._waits_for_lock:
            reason = "another process is still uploading this run"
        rest = "the rest is" if num_pending else "but not all files that belong to them, which are"
        return (
            f"{total - num_pending} of {total} checkpoints uploaded to {self.remote.where}, {rest} in {folder}: "
            f"{reason.rstrip('.')}. `python -m wmtp.sync {shlex.quote(folder)}` uploads them"
        )

    def _upload(self) -> None:
        """Upload until the run closes. Runs in the background thread."""
        with self._upload_lock():
            self._abort_interrupted_uploads()
            self._files.send_changed(RECORDS)
            while True:
                is_last = self._sender.is_closing  # read first, so that the last search follows the end of the run
                self._send_new()
                if is_last:
                    break
                self._sender.wait(self.poll_seconds)
            self._files.send_changed(RECORDS + FINAL_FILES)
            if self.uploaded:
                self._prune(set())

    @contextmanager
    def _upload_lock(self) -> Iterator[None]:
        """Hold the lock that lets one process at a time upload this run."""

        def _should_give_up() -> bool:
            if not self._waits_for_lock:
                log.warning("%s: another process is uploading this run; waiting for it", self.folder)
            self._waits_for_lock = True
            return self._sender.is_cancelled

        with file_lock(self.folder / LOCK, _should_give_up):
            self._waits_for_lock = False
            yield

    def _abort_interrupted_uploads(self) -> None:
        """Abort multipart uploads of a killed process, with a warning if the store does not allow it."""

        def _abort() -> int:
            try:
                return self.remote.abort_uploads()
            except StoreUnreachable:
                raise
            except (StoreError, InputError) as error:
                log.warning("interrupted uploads stay in the store, hidden: %s", error)
                return 0

        if count := self._sender.retry(_abort):
            log.info("%s: %d interrupted uploads were removed", self.remote.where, count)

    def _send_new(self) -> None:
        """Upload all pending checkpoints and changed files, and delete superseded checkpoints in S3."""
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
        return pending(self.folder, self.remote.url, self.keep_last, self._damaged_checkpoints())

    def _damaged_checkpoints(self) -> set[Path]:
        """Return the checkpoints that were found damaged and have not been replaced since."""
        return {path for path, written in self._damaged.items() if read_or_none(path / manifest.NAME) == written}

    def _send_checkpoint(self, path: Path) -> None:
        """Upload a checkpoint, its manifest last. A damaged checkpoint is skipped, now and later, with a warning."""
        self._current = key = path.relative_to(self.folder).as_posix()
        written = read_or_none(path / manifest.NAME)
        if written is None:
            return  # it was deleted in the meantime
        try:
            self._send_files(path, key, written)
        except LocalFileError as problem:
            if read_or_none(path / manifest.NAME) == written:
                self._damaged[path] = written
                log.warning("%s is damaged and is not uploaded: %s", path, problem)
        finally:
            self._current, self._bytes_of_current = "", 0

    def _send_files(self, path: Path, key: str, written: bytes) -> None:
        try:
            files = manifest.parse(written)
        except ValueError as error:
            raise LocalFileError(str(error)) from error
        remote_manifest = self._sender.retry(self.remote.get, f"{key}/{manifest.NAME}")
        if remote_manifest != written:
            if remote_manifest is not None:  # another checkpoint of the same step
                self._sender.retry(self._delete, f"{key}/{manifest.NAME}")
            for name, entry in files.items():
                self._send(path / name, f"{key}/{name}", entry["sha256"])
            self._sender.retry(self.remote.put_bytes, written, f"{key}/{manifest.NAME}")
            self.uploaded.append(key)
        self._sender.retry(self._mark_uploaded, path, written)

    def _mark_uploaded(self, path: Path, written: bytes) -> None:
        if read_or_none(path / manifest.NAME) == written:
            with suppress(FileNotFoundError):  # it was deleted in the meantime
                mark_uploaded(path, self.remote.url)

    def _delete(self, key: str) -> None:
        if problems := self.remote.delete([key]):
            raise StoreError(f"{self.remote.where}: {key} cannot be deleted: {problems[key]}")

    def _send(self, path: Path, key: str, sha256: str | None = None) -> None:
        def _put() -> LocalFileError | None:
            retry = self._sender.retry
            try:
                self.remote.put(path, key, sha256=sha256, retry=retry, on_progress=self._count_bytes)
            except LocalFileError as error:  # a retry is useless
                return error
            return None

        problem = self._sender.retry(_put)
        if problem is not None:
            raise problem

    def _count_bytes(self, count: int) -> None:
        self._bytes_sent += count
        self._bytes_of_current += count if self._current else 0
        self._sender.heartbeat()

    def _prune(self, changed: set[str]) -> None:
        """Delete superseded checkpoints in S3. Failures are logged, and tried again after the next upload."""
        for stage in sorted(changed | self._stages_to_prune):
            try:
                problems = self._delete_superseded(stage)
            except (StoreError, InputError) as error:
                problems = {stage: str(error)}
            if problems:
                self._stages_to_prune.add(stage)
                key, problem = next(iter(problems.items()))
                log.warning("%s: superseded checkpoints cannot be deleted yet: %s %s", self.remote.where, key, problem)
            else:
                self._stages_to_prune.discard(stage)

    def _delete_superseded(self, stage: str) -> dict[str, str]:
        try:
            best = read_pointer(self.folder / stage / "checkpoints" / "best.json")
        except (ValueError, KeyError, TypeError):
            return {}  # the best checkpoint is unknown, so delete none
        local = {path.name for path in to_upload(self.folder, self.keep_last) if stage_of(self.folder, path) == stage}
        keep = local | {name for name in (best, read_remote_best(self.remote, stage)) if name is not None}
        return delete_superseded(self.remote, stage, self.keep_last, keep)
