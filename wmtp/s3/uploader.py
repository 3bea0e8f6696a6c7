"""Upload the checkpoints and other files of a run to S3 in a background thread, while training writes them."""

import logging
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from wmtp.errors import InputError, PendingError
from wmtp.runtime.atomic_files import folder_size
from wmtp.runtime.background import SHUTDOWN_LIMIT_S, SHUTDOWN_STALL_S, BackgroundSender, format_error
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import display_path
from wmtp.s3.checkpoint_sender import CheckpointSender
from wmtp.s3.client import S3Folder, StoreError, StoreUnreachable
from wmtp.s3.layout import FINAL_FILES, RECORDS, stage_of
from wmtp.s3.options import S3Settings
from wmtp.s3.progress import TransferProgress
from wmtp.s3.retention import RemotePruner
from wmtp.s3.run_files import RunFilesUploader

log = logging.getLogger(__name__)
LOCK = Path(".hydra") / "upload.lock"


class CheckpointUploader:
    """Uploader that copies a run to S3 in a background thread.

    Only one process at a time uploads a run. Other processes wait until this upload ends.
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
        self.folder, self.settings, self.console, self.is_training = folder, settings, console, is_training
        self._sender = BackgroundSender(url, self._upload)
        self.remote = S3Folder(url, settings, retry=self._sender.retry, on_progress=self._count_bytes)
        self._sender.server = self.remote.display_url
        self.checkpoints = CheckpointSender(folder, self.remote, keep_last, self._sender.retry)
        self._files = RunFilesUploader(folder, self.remote)
        self._pruner = RemotePruner(folder, self.remote, keep_last)
        self._bytes_sent = self._bytes_of_current = 0
        self._waits_for_lock = False
        self._sender.start()

    @property
    def server(self) -> str:
        """URL of the run in S3, for use in messages."""
        return self.remote.display_url

    @property
    def report(self) -> str:
        """Message that says how many checkpoints and other files were uploaded."""
        num_checkpoints, num_files = len(self.checkpoints.sent), self._files.num_sent
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
        to_send = sum(map(folder_size, self.checkpoints.pending())) - self._bytes_of_current
        with TransferProgress(self.console, f"uploading to {self.remote.url}") as progress:

            def _show_progress() -> None:
                """Show how many bytes of the pending checkpoints were sent."""
                if to_send > 0:
                    progress.update(self._bytes_sent - before, to_send, self.checkpoints.current)

            if not self._sender.wait_until_done(stall, limit, _show_progress) or self.checkpoints.pending():
                raise PendingError(self.unsent())

    def unsent(self) -> str:
        """Return a message about the data that were not uploaded.

        The message contains the number of checkpoints, the run's folder, the reason, and a command that uploads them.
        """
        total, num_pending = len(self.checkpoints.selected()), len(self.checkpoints.pending())
        error, folder = self._sender.last_error, display_path(self.folder)
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
            if self.checkpoints.sent:
                self._pruner.prune(set())

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
        try:
            if count := self.remote.abort_uploads():
                log.info("%s: %d interrupted uploads were removed", self.remote.display_url, count)
        except StoreUnreachable:
            raise
        except (StoreError, InputError) as error:
            log.warning("interrupted uploads cannot be removed from the store: %s", error)

    def _send_new(self) -> None:
        """Upload new checkpoints and changed pointer files. Delete checkpoints in S3 that are no longer needed."""
        while True:
            path = next(iter(self.checkpoints.pending()), None)
            if path is not None:
                self._files.send_changed(RECORDS)
                self.checkpoints.send(path)
                self._bytes_of_current = 0
            changed = self._files.send_pointers()
            if path is not None:
                changed.add(stage_of(self.folder, path))
            if changed:
                self._pruner.prune(changed)
            if path is None:
                return

    def _count_bytes(self, count: int) -> None:
        """Add uploaded bytes to the progress, and record that the store responds."""
        self._bytes_sent += count
        self._bytes_of_current += count if self.checkpoints.current else 0
        self._sender.heartbeat()
