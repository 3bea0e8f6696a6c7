"""A checkpoint store on disk. Where possible, it keeps each checkpoint until the checkpoint is uploaded to S3."""

import logging
import shutil
from pathlib import Path
from typing import Literal

from wmtp.checkpoint.store import CheckpointStore
from wmtp.distributed.process_group import Processes
from wmtp.field_types import Positive
from wmtp.runtime.atomic_files import folder_size
from wmtp.s3.layout import uploaded_to
from wmtp.s3.options import S3Settings

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
        s3: S3Settings,
        keep_last: Positive = 2,
        format: Literal["whole", "sharded"] = "whole",  # noqa: A002 - name of the config key
    ) -> None:
        """Create the store.

        Checkpoints that were uploaded to a URL below `s3.url` count as uploaded. The other parameters are those of
        `CheckpointStore`.
        """
        super().__init__(folder, processes, keep_last=keep_last, format=format)
        self.s3 = s3

    def _superseded(self, best: str | None) -> list[Path]:
        found, superseded = self._list(), super()._superseded(best)
        uploaded = [path for path in found if (uploaded_to(path) or "").startswith(f"{self.s3.url}/")]
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
