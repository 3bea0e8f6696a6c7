"""One checkpoint on its way from S3 to a folder: verified, and seen there only when it is whole."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_random_exponential

from wmtp.checkpoint import manifest
from wmtp.checkpoint.manifest import Entries, damage
from wmtp.runtime.atomic_files import content_if_there, sync, write_synced
from wmtp.s3.client import S3Folder
from wmtp.s3.errors import ObjectMissing, StoreError
from wmtp.s3.layout import mark_uploaded
from wmtp.s3.multipart import ignored
from wmtp.s3.progress import Transfer

log = logging.getLogger(__name__)
STAGING = ".fetching-"
"""Begins the name of a checkpoint that is on its way."""
ATTEMPTS = 5
Result = TypeVar("Result")


def patiently(call: Callable[[], Result]) -> Result:
    """A call's result, tried several times if the store fails."""
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, StoreError) and not isinstance(error, ObjectMissing)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, max=10),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return retrying(call)


class Download:
    """Brings checkpoints of a run to its folder."""

    def __init__(self, remote: S3Folder, folder: Path, console: Console | None) -> None:
        self.remote, self.folder, self.console = remote, folder, console

    def bring(self, stage: str, name: str) -> bool:
        """Bring a checkpoint, unless it is here; False, with a warning, if it is not whole there."""
        key, final = f"{stage}checkpoints/{name}", self.folder / stage / "checkpoints" / name
        staged = final.with_name(STAGING + name)
        try:
            written = patiently(lambda: self.remote.get(f"{key}/{manifest.NAME}"))
            if written is None:
                raise ValueError(f"it has no {manifest.NAME}")
            files = manifest.parsed(written)
            if final.exists() and damage(final) is None:
                if (final / manifest.NAME).read_bytes() == written:
                    mark_uploaded(final, self.remote.url)
                return True
            self._stage(key, staged, written, files)
        except (ValueError, ObjectMissing) as problem:
            log.warning("%s/%s is not whole there (%s); the one before is used", self.remote.url, key, problem)
            shutil.rmtree(staged, ignore_errors=True)
            return False
        if final.exists():
            aside = final.with_name(f"damaged-{name}")
            log.warning("%s is damaged here; set aside as %s", final, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        staged.rename(final)
        sync(final.parent)
        mark_uploaded(final, self.remote.url)
        for left in final.parent.glob(f"{STAGING}*"):  # of a download that was interrupted, when this was not there yet
            shutil.rmtree(left)
        return True

    def _stage(self, key: str, staged: Path, written: bytes, files: Entries) -> None:
        """Download a checkpoint's files into a hidden folder. Raises `ValueError` if they are not what was written."""
        if content_if_there(staged / manifest.NAME) != written:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            write_synced(staged / manifest.NAME, written)
        total = sum(entry["bytes"] for entry in files.values())
        done = sum(path.stat().st_size for name in files if (path := staged / name).exists())
        with Transfer(self.console, f"fetching {self.remote.url}/{key}") as transfer:

            def moved(count: int) -> None:
                nonlocal done
                done += count
                transfer.show(done, total)

            for name, entry in files.items():
                for is_second in (False, True):
                    if self.file(f"{key}/{name}", staged / name, entry["bytes"], moved) == entry["sha256"]:
                        break
                    (staged / name).unlink()
                    if is_second:
                        raise ValueError(f"{name} does not have the content that was written")
                sync(staged / name)
        sync(staged)

    def file(self, key: str, path: Path, size: int, moved: Callable[[int], None] = ignored) -> str:
        """Download a file, with new patience whenever something arrived; its SHA-256."""
        while True:
            before = path.stat().st_size if path.exists() else 0
            try:
                return patiently(lambda: self.remote.download(key, path, size, moved))
            except StoreError:
                if not path.exists() or path.stat().st_size <= before:
                    raise
