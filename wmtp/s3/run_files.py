"""What belongs to a run's checkpoints in its bucket: its records, and the notes that say which of them is which."""

import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from wmtp.runtime.atomic_files import content_if_there
from wmtp.s3.client import LocalProblem, S3Folder
from wmtp.s3.layout import RESULT, STAGES, is_uploaded, stage_of
from wmtp.s3.multipart import Attempt

log = logging.getLogger(__name__)


class OtherFiles:
    """The files of a run besides its checkpoints, on their way to S3: each when it has changed."""

    def __init__(self, folder: Path, remote: S3Folder, send: Callable[[Path, str], None], ask: Attempt) -> None:
        """`send` uploads a file under a key, and raises `LocalProblem` if it is not there any more.

        `ask` makes a call to the store, with patience.
        """
        self.folder, self.remote = folder, remote
        self.num_sent = 0
        self._send, self._ask = send, ask
        self._versions: dict[Path, tuple[int, int, int]] = {}
        self._notes: dict[str, bytes] = {}

    def send_changed(self, patterns: Iterable[str]) -> None:
        """Send those files that do not lie there as they are now."""
        for path in [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]:
            key = path.relative_to(self.folder).as_posix()
            try:
                status = path.stat()
                version = (status.st_mtime_ns, status.st_size, status.st_ino)
                if self._versions.get(path) == version:
                    continue
                if path in self._versions or not self._is_there(path, key):
                    self._send(path, key)
                    self.num_sent += 1
            except (LocalProblem, FileNotFoundError) as problem:
                log.warning("%s cannot be uploaded: %s", path, problem)
            else:
                self._versions[path] = version

    def send_notes(self) -> set[str]:
        """Send the notes that name a checkpoint, once that lies there; the stages of those that had changed."""
        notes = {f"{stage}checkpoints/{name}.json": "folder" for stage in STAGES for name in ("best", "latest")}
        changed: set[str] = set()
        for key, field in [*notes.items(), (RESULT, "saved")]:
            content = content_if_there(self.folder / key)
            if content is None or self._notes.get(key) == content:
                continue
            base = self.folder if key == RESULT else (self.folder / key).parent
            try:
                checkpoint = base / str(json.loads(content)[field])
            except (ValueError, KeyError, TypeError) as error:
                log.warning("%s is damaged and is not uploaded: %s", self.folder / key, error)
                self._notes[key] = content
                continue
            if is_uploaded(checkpoint, self.remote.url):
                if key in self._notes or self._ask(partial(self.remote.get, key)) != content:
                    self._ask(partial(self.remote.put_bytes, content, key))
                    self.num_sent += 1
                    changed |= {stage_of(self.folder, checkpoint)} if key != RESULT else set()
                self._notes[key] = content
        return changed

    def _is_there(self, path: Path, key: str) -> bool:
        """Whether an earlier process has sent a file as it is."""

        def asked() -> bool | LocalProblem:
            try:
                return self.remote.holds(path, key)
            except LocalProblem as problem:  # no patience helps
                return problem

        answer: bool | LocalProblem = self._ask(asked)
        if isinstance(answer, LocalProblem):
            raise answer
        return answer
