"""Download checkpoints from S3. A checkpoint is downloaded to a temporary folder, verified, and then renamed."""

import logging
import shutil
from pathlib import Path

from rich.console import Console

from wmtp.checkpoint import manifest
from wmtp.checkpoint.manifest import Entries, find_damage
from wmtp.runtime.atomic_files import fsync_path, read_or_none, write_synced
from wmtp.s3.client import S3Folder
from wmtp.s3.errors import ObjectMissing
from wmtp.s3.layout import mark_uploaded
from wmtp.s3.progress import TransferProgress

log = logging.getLogger(__name__)
STAGING = ".fetching-"
"""Prefix of the name of the temporary folder to which a checkpoint is downloaded."""


class CheckpointDownloader:
    """Downloader of single checkpoints and other files of one run. It writes them to the run's local folder."""

    def __init__(self, remote: S3Folder, folder: Path, console: Console | None) -> None:
        self.remote, self.folder, self.console = remote, folder, console

    def fetch(self, stage: str, name: str) -> bool:
        """Download a checkpoint, unless the local folder already contains it undamaged.

        Args:
            stage: path prefix of the checkpoint's training stage, one of `STAGES`.
            name: name of the checkpoint's folder.

        Returns:
            True if the checkpoint exists locally after the call. False if the checkpoint in S3 is incomplete or
            damaged; then a warning is logged.
        """
        key, final = f"{stage}checkpoints/{name}", self.folder / stage / "checkpoints" / name
        staged = final.with_name(STAGING + name)
        try:
            manifest_bytes = self.remote.get(f"{key}/{manifest.NAME}")
            if manifest_bytes is None:
                raise ValueError(f"it has no {manifest.NAME}")
            files = manifest.parse(manifest_bytes)
            if final.exists() and find_damage(final) is None:
                if (final / manifest.NAME).read_bytes() == manifest_bytes:
                    mark_uploaded(final, self.remote.url)
                return True
            self._stage(key, staged, manifest_bytes, files)
        except (ValueError, ObjectMissing) as error:
            log.warning("%s/%s is incomplete (%s); the previous checkpoint is used", self.remote.url, key, error)
            shutil.rmtree(staged, ignore_errors=True)
            return False
        if final.exists():
            renamed = final.with_name(f"damaged-{name}")
            log.warning("%s is damaged; renamed to %s", final, renamed.name)
            shutil.rmtree(renamed, ignore_errors=True)
            final.rename(renamed)
        staged.rename(final)
        fsync_path(final.parent)
        mark_uploaded(final, self.remote.url)
        for path in final.parent.glob(f"{STAGING}*"):  # left by interrupted downloads of other checkpoints
            shutil.rmtree(path)
        return True

    def _stage(self, key: str, staged: Path, manifest_bytes: bytes, files: Entries) -> None:
        """Download the files of a checkpoint into a temporary folder.

        Args:
            key: key of the checkpoint's folder in S3.
            staged: path of the temporary folder. Files from an interrupted download of the same checkpoint are used.
            manifest_bytes: content of the checkpoint's manifest file.
            files: the entries of this manifest, which contain the size and the SHA-256 of each file.

        Raises:
            ValueError: a file was downloaded twice, and did not have the SHA-256 of the manifest either time.
        """
        if read_or_none(staged / manifest.NAME) != manifest_bytes:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            write_synced(staged / manifest.NAME, manifest_bytes)
        total = sum(entry["bytes"] for entry in files.values())
        done = sum(path.stat().st_size for name in files if (path := staged / name).exists())
        with TransferProgress(self.console, f"fetching {self.remote.url}/{key}") as progress:

            def _add(count: int) -> None:
                """Add received bytes to the displayed progress."""
                nonlocal done
                done += count
                progress.update(done, total)

            for name, entry in files.items():
                for is_second in (False, True):
                    found = self.remote.download(f"{key}/{name}", staged / name, entry["bytes"], _add)
                    if found == entry["sha256"]:
                        break
                    (staged / name).unlink()
                    if is_second:
                        raise ValueError(f"{name} does not have the content that was written")
                fsync_path(staged / name)
        fsync_path(staged)
