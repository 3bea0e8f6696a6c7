"""Select the checkpoints of a run that S3 lacks, and upload single checkpoints."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from wmtp.checkpoint import manifest
from wmtp.runtime.atomic_files import read_or_none
from wmtp.s3.client import LocalFileError, S3Folder
from wmtp.s3.layout import checkpoints_to_upload, mark_uploaded, pending_checkpoints

log = logging.getLogger(__name__)


class CheckpointSender:
    """Sender of the checkpoints of one run.

    The manifest of a checkpoint is uploaded last. A checkpoint without a manifest is ignored, so an incomplete
    checkpoint is never used.
    """

    def __init__(
        self, folder: Path, remote: S3Folder, keep_last: int, retry: Callable[[Callable[[], None]], None]
    ) -> None:
        """Create the sender. Nothing is sent yet.

        Args:
            folder: the run's folder.
            remote: the folder of the run in S3.
            keep_last: number of the newest checkpoints of each stage that are sent. The best one is also sent.
            retry: function that repeats a call if the local disk fails.
        """
        self.folder, self.remote, self.keep_last = folder, remote, keep_last
        self.sent: list[str] = []
        """Paths of the checkpoints that were sent. They are relative to the run's folder."""
        self.current = ""
        """Path of the checkpoint that is being sent. It is relative to the run's folder."""
        self._retry = retry
        self._damaged: dict[Path, bytes] = {}

    def selected(self) -> list[Path]:
        """Return the local checkpoints that S3 should contain, in the order in which they are sent."""
        return checkpoints_to_upload(self.folder, self.keep_last, self._damaged_checkpoints())

    def pending(self) -> list[Path]:
        """Return the selected checkpoints that were not sent yet."""
        return pending_checkpoints(self.folder, self.remote.url, self.keep_last, self._damaged_checkpoints())

    def send(self, path: Path) -> None:
        """Upload a checkpoint. If it is damaged, log a warning and do not select it again."""
        manifest_bytes = read_or_none(path / manifest.NAME)
        if manifest_bytes is None:
            return  # the checkpoint was deleted in the meantime
        self.current = path.relative_to(self.folder).as_posix()
        try:
            self._send_files(path, self.current, manifest_bytes)
        except LocalFileError as error:
            if read_or_none(path / manifest.NAME) == manifest_bytes:
                self._damaged[path] = manifest_bytes
                log.warning("%s is damaged and is not uploaded: %s", path, error)
        finally:
            self.current = ""

    def _send_files(self, path: Path, key: str, manifest_bytes: bytes) -> None:
        try:
            files = manifest.parse(manifest_bytes)
        except ValueError as error:
            raise LocalFileError(str(error)) from error
        manifest_key = f"{key}/{manifest.NAME}"
        remote_manifest = self.remote.get(manifest_key)
        if remote_manifest != manifest_bytes:
            if remote_manifest is not None:  # S3 has another checkpoint of the same step
                self.remote.delete_object(manifest_key)
            for name, entry in files.items():
                self.remote.put(path / name, f"{key}/{name}", sha256=entry["sha256"])
            self.remote.put_bytes(manifest_bytes, manifest_key)
            self.sent.append(key)
        self._retry(lambda: self._mark_uploaded(path, manifest_bytes))

    def _mark_uploaded(self, path: Path, manifest_bytes: bytes) -> None:
        if read_or_none(path / manifest.NAME) == manifest_bytes:
            with suppress(FileNotFoundError):  # the checkpoint was deleted in the meantime
                mark_uploaded(path, self.remote.url)

    def _damaged_checkpoints(self) -> set[Path]:
        """Return the local checkpoints that were found damaged and did not change since then."""
        return {path for path, damaged in self._damaged.items() if read_or_none(path / manifest.NAME) == damaged}
