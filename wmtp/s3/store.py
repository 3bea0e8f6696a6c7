"""A checkpoint store that keeps what was not uploaded yet."""

import logging
import shutil
from pathlib import Path
from typing import Literal

from wmtp.checkpoint.store import CheckpointStore
from wmtp.distributed.process_group import Processes
from wmtp.field_types import Positive, PositiveFloat
from wmtp.runtime.atomic_files import size_of
from wmtp.runtime.run_dir import read_run
from wmtp.s3.layout import is_uploaded
from wmtp.s3.options import Address, AddressingStyle, Checksums, Endpoint

log = logging.getLogger(__name__)


class RemoteCheckpointStore(CheckpointStore):
    """The checkpoints of a run that a mirror copies to S3: one that waits for that stays until newer ones are there.

    The disk comes first: before it is full, the oldest that waits has to go.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes | None = None,
        *,
        remote: Address,
        keep_last: Positive = 2,
        format: Literal["whole", "sharded"] = "whole",  # noqa: A002 - the config's word
        endpoint_url: Endpoint | None = None,
        addressing_style: AddressingStyle = "auto",
        checksums: Checksums = "when_supported",
        stall_seconds: PositiveFloat = 30.0,
        close_seconds: PositiveFloat = 1200.0,
    ) -> None:
        """The keywords that are not a `CheckpointStore`'s are for whoever talks to the bucket."""
        super().__init__(folder, processes, keep_last=keep_last, format=format)
        self.run = folder

    def _url(self) -> str | None:
        """The run's place in S3; its folder is this one, or the one around that of the stage before."""
        run = read_run(self.run) or read_run(self.run.parent)
        return None if run is None else run["remote"]

    def _superseded(self, best: str | None) -> list[Path]:
        url, found, old = self._url(), self._found(), super()._superseded(best)
        there = [path for path in found if is_uploaded(path, url)]
        waiting = [p for p in old if p not in there and len([u for u in there if u.name > p.name]) < self.keep_last]
        if waiting:
            sizes = {path: size_of(path) for path in found}
            free = shutil.disk_usage(self.folder).free
        while waiting and free < 2 * max(sizes.values()):
            path = waiting.pop(0)
            free += sizes[path]
            log.warning("%s was not uploaded, but goes: the disk is nearly full", path)
        return [path for path in old if path not in waiting]
