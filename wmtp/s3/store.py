"""A checkpoint store on disk. Where possible, it keeps each checkpoint until the checkpoint is uploaded to S3."""

import logging
import shutil
from pathlib import Path
from typing import Literal

from wmtp.checkpoint.store import CheckpointStore
from wmtp.distributed.process_group import Processes
from wmtp.field_types import Positive, PositiveFloat
from wmtp.runtime.atomic_files import folder_size
from wmtp.runtime.run_dir import read_run
from wmtp.s3.layout import is_uploaded
from wmtp.s3.options import AddressingStyle, Checksums, Endpoint, S3Url

log = logging.getLogger(__name__)


class RemoteCheckpointStore(CheckpointStore):
    """Store of checkpoints on disk. A `CheckpointUploader` uploads these checkpoints to S3.

    A checkpoint that was not uploaded is kept until `keep_last` newer checkpoints are uploaded. But if the free space
    on the disk is less than the size of two checkpoints, the oldest of these checkpoints is deleted, although it was
    not uploaded.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes | None = None,
        *,
        remote: S3Url,
        keep_last: Positive = 2,
        format: Literal["whole", "sharded"] = "whole",  # noqa: A002 - name of the config key
        endpoint_url: Endpoint | None = None,
        addressing_style: AddressingStyle = "auto",
        checksums: Checksums = "when_supported",
        stall_seconds: PositiveFloat = 30.0,
        close_seconds: PositiveFloat = 1200.0,
    ) -> None:
        """Create the store.

        Only `folder`, `processes`, `keep_last` and `format` are used. They have the same meaning as in
        `CheckpointStore`. All other parameters are config values for the uploader.
        """
        super().__init__(folder, processes, keep_last=keep_last, format=format)
        self.run_folder = folder

    def _remote_url(self) -> str | None:
        """Return the S3 URL of the run. Return None if the run has no S3 URL or is unknown.

        In stage 2, `self.run_folder` is the folder of the run. In stage 1, its parent is the folder of the run.
        """
        run = read_run(self.run_folder) or read_run(self.run_folder.parent)
        return None if run is None else run["remote"]

    def _superseded(self, best: str | None) -> list[Path]:
        url, found, superseded = self._remote_url(), self._list(), super()._superseded(best)
        uploaded = [path for path in found if is_uploaded(path, url)]
        waiting = [
            path
            for path in superseded
            if path not in uploaded and sum(newer.name > path.name for newer in uploaded) < self.keep_last
        ]
        if waiting:
            sizes = {path: folder_size(path) for path in found}
            free = shutil.disk_usage(self.folder).free
        while waiting and free < 2 * max(sizes.values()):
            path = waiting.pop(0)
            free += sizes[path]
            log.warning("%s is deleted although it was not uploaded: the disk is nearly full", path)
        return [path for path in superseded if path not in waiting]
