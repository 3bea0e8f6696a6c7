"""Following a run's folder: its newest checkpoints, its best, and what belongs to them, copied to S3."""

import logging
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from wmtp.checkpoint import manifest
from wmtp.checkpoint.listing import noted
from wmtp.errors import InputError, PendingError
from wmtp.field_types import Positive, PositiveFloat
from wmtp.runtime.atomic_files import content_if_there, size_of
from wmtp.runtime.background import GOODBYE, IN_HASTE, Courier, described
from wmtp.runtime.locks import one_at_a_time
from wmtp.runtime.run_dir import typed
from wmtp.s3.client import LocalProblem, S3Folder, StoreError, StoreUnreachable
from wmtp.s3.layout import CONCLUSIONS, RECORDS, STAGES, mark_uploaded, pending, stage_of, wanted
from wmtp.s3.progress import Transfer
from wmtp.s3.retention import delete_superseded, noted_best
from wmtp.s3.run_files import OtherFiles

log = logging.getLogger(__name__)
LOCK = Path(".hydra") / "upload.lock"


class Mirror:
    """Keeps a copy of a run in S3, in the background.

    A checkpoint is seen there when its manifest is, which comes last. One process at a time sends a run; others wait.
    """

    poll_seconds = 1.0
    """Time between two looks into the folder."""

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
        """Begins at once.

        Args:
            folder: the run's.
            remote: the run's place in S3.
            console: where uploads are shown that the end waits for.
            is_training: whether the end may wait only for a limited time, as others wait for the hardware.
            keep_last: how many of a stage's newest checkpoints lie there, besides the best.
            stall_seconds: at the end, how long a store that does not answer is waited for.
            close_seconds: at the end, how long uploads that go on are waited for.
        """
        self.folder, self.remote, self.console = folder, remote, console
        self.is_training, self.keep_last = is_training, keep_last
        self.stall_seconds, self.close_seconds = stall_seconds, close_seconds
        self.uploaded: list[str] = []
        """The checkpoints that were sent, by their paths in the folder."""
        self._damaged: dict[Path, bytes] = {}
        self._courier = Courier(remote.where, self._deliver)
        self._others = OtherFiles(folder, remote, self._send, self._courier.retried)
        self._bytes_moved = self._bytes_of_current = 0
        self._sending = ""
        self._untidy = set(STAGES)
        self._waits_for_another = False
        self._courier.start()

    @property
    def server(self) -> str:
        """Whom it tells."""
        return self.remote.where

    @property
    def report(self) -> str:
        """What was sent, in words."""
        num_checkpoints, num_files = len(self.uploaded), self._others.num_sent
        if not num_checkpoints and not num_files:
            return f"{self.remote.url}: nothing was missing"
        checkpoints = f"{num_checkpoints} checkpoint{'' if num_checkpoints == 1 else 's'}"
        return f"{checkpoints} and {num_files} other file{'' if num_files == 1 else 's'} sent to {self.remote.url}"

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Nothing: metrics go with the checkpoints."""

    def close(self, state: str) -> None:
        """Wait for what is left to be sent.

        Raises:
            PendingError: not all of it was.
        """
        limit, patience = self.close_seconds if self.is_training else math.inf, self.stall_seconds
        if self.is_training and state != "FINISHED":
            limit, patience = min(GOODBYE, limit), min(IN_HASTE, patience)
        before = self._bytes_moved
        to_go = sum(map(size_of, self._pending())) - self._bytes_of_current
        with Transfer(self.console, f"uploading to {self.remote.url}") as transfer:
            for _ in self._courier.finish(patience, limit):
                if to_go > 0:
                    transfer.show(self._bytes_moved - before, to_go, self._sending)
            if self._pending() or not self._courier.is_done:
                raise PendingError(self.left_behind())

    def left_behind(self) -> str:
        """What is not uploaded, why, where it lies, and what sends it."""
        total, count = len(wanted(self.folder, self.keep_last, self._unsound())), len(self._pending())
        error = self._courier.last_error
        reason = described(error) if error is not None else "they were not waited for any longer"
        if self._waits_for_another:
            reason = "another process is sending it, and was not waited for any longer"
        rest = "the rest lies" if count else "but not all that belongs to them; it lies"
        return (
            f"{total - count} of {total} checkpoints uploaded to {self.remote.where}, {rest} in {typed(self.folder)}: "
            f"{reason.rstrip('.')}. `python -m wmtp.sync {shlex.quote(typed(self.folder))}` sends it"
        )

    def _deliver(self) -> None:
        with self._alone():
            self._forget_unfinished()
            self._others.send_changed(RECORDS)
            while True:
                is_last = self._courier.is_ending  # asked first, so that the last look comes after the end
                self._send_what_is_new()
                if is_last:
                    break
                self._courier.wait(self.poll_seconds)
            self._others.send_changed(RECORDS + CONCLUSIONS)
            if self.uploaded:
                self._tidy(set())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time send this run."""

        def gives_up() -> bool:
            if not self._waits_for_another:
                log.warning("%s: another process is sending this run; it is waited for", self.folder)
            self._waits_for_another = True
            return self._courier.is_abandoned

        with one_at_a_time(self.folder / LOCK, gives_up):
            self._waits_for_another = False
            yield

    def _forget_unfinished(self) -> None:
        """Remove what an upload left that was killed; a store that cannot be asked for it keeps it."""

        def forget() -> int:
            try:
                return self.remote.abort_uploads()
            except StoreUnreachable:
                raise
            except (StoreError, InputError) as error:
                log.warning("uploads that were interrupted stay in the store, hidden: %s", error)
                return 0

        if count := self._courier.retried(forget):
            log.info("%s: %d uploads that were interrupted were removed", self.remote.where, count)

    def _send_what_is_new(self) -> None:
        while True:
            path = next(iter(self._pending()), None)
            if path is not None:
                self._others.send_changed(RECORDS)
                self._send_checkpoint(path)
            changed = self._others.send_notes()
            if path is not None:
                changed.add(stage_of(self.folder, path))
            if changed:
                self._tidy(changed)
            if path is None:
                return

    def _pending(self) -> list[Path]:
        return pending(self.folder, self.remote.url, self.keep_last, self._unsound())

    def _unsound(self) -> set[Path]:
        """The checkpoints that were found damaged and are still the same."""
        return {path for path, written in self._damaged.items() if content_if_there(path / manifest.NAME) == written}

    def _send_checkpoint(self, path: Path) -> None:
        """Send a checkpoint, its manifest last. One that is damaged here is not sent, and from then on passed over."""
        self._sending = key = path.relative_to(self.folder).as_posix()
        written = content_if_there(path / manifest.NAME)
        if written is None:
            return  # it was removed just now
        try:
            self._send_files(path, key, written)
        except LocalProblem as problem:
            if content_if_there(path / manifest.NAME) == written:
                self._damaged[path] = written
                log.warning("%s is damaged and is not uploaded: %s", path, problem)
        finally:
            self._sending, self._bytes_of_current = "", 0

    def _send_files(self, path: Path, key: str, written: bytes) -> None:
        try:
            files = manifest.parsed(written)
        except ValueError as error:
            raise LocalProblem(str(error)) from error
        there = self._courier.retried(self.remote.get, f"{key}/{manifest.NAME}")
        if there != written:
            if there is not None:  # of another checkpoint of this step
                self._courier.retried(self._delete, f"{key}/{manifest.NAME}")
            for name, entry in files.items():
                self._send(path / name, f"{key}/{name}", entry["sha256"])
            self._courier.retried(self.remote.put_bytes, written, f"{key}/{manifest.NAME}")
            self.uploaded.append(key)
        self._courier.retried(self._mark, path, written)

    def _mark(self, path: Path, written: bytes) -> None:
        if content_if_there(path / manifest.NAME) == written:
            with suppress(FileNotFoundError):  # it was removed just now
                mark_uploaded(path, self.remote.url)

    def _delete(self, key: str) -> None:
        if problems := self.remote.delete([key]):
            raise StoreError(f"{self.remote.where}: {key} cannot be deleted: {problems[key]}")

    def _send(self, path: Path, key: str, sha256: str | None = None) -> None:
        def sent() -> LocalProblem | None:
            try:
                self.remote.put(path, key, sha256=sha256, attempt=self._courier.retried, moved=self._note_moved)
            except LocalProblem as problem:  # no patience helps
                return problem
            return None

        problem = self._courier.retried(sent)
        if problem is not None:
            raise problem

    def _note_moved(self, count: int) -> None:
        self._bytes_moved += count
        self._bytes_of_current += count if self._sending else 0
        self._courier.moved()

    def _tidy(self, changed: set[str]) -> None:
        """Delete what is superseded there. What fails is said, and tried again after the next upload."""
        for stage in sorted(changed | self._untidy):
            try:
                problems = self._delete_superseded(stage)
            except (StoreError, InputError) as error:
                problems = {stage: str(error)}
            if problems:
                self._untidy.add(stage)
                key, problem = next(iter(problems.items()))
                log.warning("%s: superseded checkpoints cannot be deleted yet: %s %s", self.remote.where, key, problem)
            else:
                self._untidy.discard(stage)

    def _delete_superseded(self, stage: str) -> dict[str, str]:
        try:
            best = noted(self.folder / stage / "checkpoints" / "best.json")
        except (ValueError, KeyError, TypeError):
            return {}  # any may be the best
        here = {path.name for path in wanted(self.folder, self.keep_last) if stage_of(self.folder, path) == stage}
        keep = here | {name for name in (best, noted_best(self.remote, stage)) if name is not None}
        return delete_superseded(self.remote, stage, self.keep_last, keep)
