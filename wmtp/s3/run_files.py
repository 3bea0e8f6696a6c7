"""Upload the files of a run that are not part of a checkpoint.

Examples are the config, the metrics, and pointer files, which name a checkpoint (for example, best.json).
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from wmtp.checkpoint.listing import checkpoint_path
from wmtp.runtime.atomic_files import read_or_none
from wmtp.s3.client import LocalFileError, S3Folder
from wmtp.s3.layout import STAGE1_RESULT, STAGES, is_uploaded, stage_of

log = logging.getLogger(__name__)


class RunFilesUploader:
    """Uploader of the files of a run that are not part of a checkpoint. It sends only new and changed files."""

    def __init__(self, folder: Path, remote: S3Folder) -> None:
        """Create the uploader of the run in `folder`. Nothing is sent yet. `remote` is the run's folder in S3."""
        self.folder, self.remote = folder, remote
        self.num_sent = 0
        self._versions: dict[Path, tuple[int, int, int]] = {}
        self._pointers: dict[str, bytes] = {}

    def send_changed(self, patterns: Iterable[str]) -> None:
        """Upload the files that match a glob pattern and that are new or have changed since their last upload."""
        for path in [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]:
            key = path.relative_to(self.folder).as_posix()
            try:
                status = path.stat()
                version = (status.st_mtime_ns, status.st_size, status.st_ino)
                if self._versions.get(path) == version:
                    continue
                if path in self._versions or not self.remote.has_content_of(path, key):
                    self.remote.put(path, key)
                    self.num_sent += 1
            except (LocalFileError, FileNotFoundError) as error:
                log.warning("%s cannot be uploaded: %s", path, error)
            else:
                self._versions[path] = version

    def send_pointers(self) -> set[str]:
        """Upload the pointer files that have changed. A pointer file is a file that names a checkpoint.

        A pointer file is skipped until the checkpoint that it names has been uploaded.

        Returns:
            The path prefixes of the stages for which best.json or latest.json was uploaded.
        """
        pointers = {f"{stage}checkpoints/{name}.json": "folder" for stage in STAGES for name in ("best", "latest")}
        changed: set[str] = set()
        for key, field in [*pointers.items(), (STAGE1_RESULT, "saved")]:
            content = read_or_none(self.folder / key)
            if content is None or self._pointers.get(key) == content:
                continue
            base = self.folder if key == STAGE1_RESULT else (self.folder / key).parent
            try:
                checkpoint = base / checkpoint_path(json.loads(content)[field])
            except (ValueError, KeyError, TypeError) as error:
                log.warning("%s is damaged and is not uploaded: %s", self.folder / key, error)
                self._pointers[key] = content
                continue
            if is_uploaded(checkpoint, self.remote.url):
                if key in self._pointers or self.remote.get(key) != content:
                    self.remote.put_bytes(content, key)
                    self.num_sent += 1
                    changed |= {stage_of(self.folder, checkpoint)} if key != STAGE1_RESULT else set()
                self._pointers[key] = content
        return changed
