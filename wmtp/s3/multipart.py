"""Upload of a local file in parts: read and hashed once, sent by a few threads at a time."""

import hashlib
import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from wmtp.errors import InputError
from wmtp.s3.errors import StoreError, UploadNotFound

MIB = 2**20
MIN_PART_BYTES, MAX_PARTS = 8 * MIB, 9000
"""Limits of a multipart upload. A store accepts at most 10,000 parts of one object."""
MAX_CONCURRENT_PARTS = 4


class LocalFileError(Exception):
    """A local file to upload is missing, unreadable, or does not have the expected content."""


class Retry(Protocol):
    """A function that makes one call to the store, with or without retries."""

    def __call__(self, call: Callable[[], Any], /) -> Any:
        """Return the result of the call."""


def no_retry(call: Callable[[], Any], /) -> Any:
    """Call once; errors are raised to the caller."""
    return call()


def no_progress(count: int, /) -> None:
    """Ignore the number of transferred bytes."""


class Body(io.BytesIO):
    """The body of one request, as a file: plain bytes would have to be sent within the connect timeout."""

    def __init__(self, data: bytes, on_progress: Callable[[int], None]) -> None:
        """Call `on_progress` with 0 bytes at each read: whether they arrive is not known yet."""
        super().__init__(data)
        self._on_progress = on_progress

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        self._on_progress(0)
        return super().read(size)


@dataclass(frozen=True)
class Part:
    """A piece of a file. The first part has number 1."""

    number: int
    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """MD5 of the part."""
        return md5(self.data)


@dataclass(frozen=True)
class SentParts:
    """The parts of a sent file: MD5 and ETag of each part, and the SHA-256 of the whole file."""

    digests: list[bytes]
    tags: list[str]
    sha256: str


def send_parts(
    file: BinaryIO,
    size: int,
    put: Callable[[Part], str],
    retry: Retry = no_retry,
    on_progress: Callable[[int], None] = no_progress,
) -> SentParts:
    """Read `size` bytes of a file and send them part by part, several at once.

    A part that fails is sent again alone, through `retry`.

    Raises:
        UploadNotFound: the store has dropped the multipart upload, so that a retry of one part is useless.
    """
    content = hashlib.sha256()
    digests, tags = list[bytes](), list[str]()
    sending: deque[tuple[Part, Future[str]]] = deque()

    def _put_again(part: Part) -> str | UploadNotFound:
        try:
            return put(part)
        except UploadNotFound as error:
            return error

    def _finish_oldest() -> None:
        part, future = sending.popleft()
        try:
            tag: str | UploadNotFound = future.result()
        except (StoreError, InputError):
            tag = retry(lambda: _put_again(part))
        if isinstance(tag, UploadNotFound):
            raise tag
        digests.append(part.digest)
        tags.append(tag)
        on_progress(len(part.data))

    for part in _read_parts(file, size):
        content.update(part.data)
        sending.append((part, _call_in_thread(put, part)))
        if len(sending) == MAX_CONCURRENT_PARTS:
            _finish_oldest()
    while sending:
        _finish_oldest()
    return SentParts(digests, tags, content.hexdigest())


def md5(data: bytes) -> bytes:
    """Return the MD5 of some bytes, from which most stores build ETags."""
    return hashlib.md5(data, usedforsecurity=False).digest()


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Raise errors of the local file as `LocalFileError`, and errors of the store unchanged."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise LocalFileError(f"{path}: {error.strerror or error}") from error
    except LocalFileError as error:
        raise LocalFileError(f"{path}: {error}") from error


def require_sha256(expected: str | None, found: str) -> None:
    """Check the SHA-256 of a file; None accepts any.

    Raises:
        LocalFileError: the hash differs.
    """
    if expected is not None and found != expected:
        raise LocalFileError("does not have the content that was written")


def _read_parts(file: BinaryIO, size: int) -> Iterator[Part]:
    length = max(MIN_PART_BYTES, math.ceil(size / MAX_PARTS / MIB) * MIB)
    for number, start in enumerate(range(0, size, length), 1):
        yield Part(number, file.read(min(length, size - start)))


def _call_in_thread(call: Callable[[Part], str], part: Part) -> Future[str]:
    """Make a call in a daemon thread, which does not delay the end of the process."""
    future: Future[str] = Future()

    def _run() -> None:
        try:
            future.set_result(call(part))
        except BaseException as error:  # noqa: BLE001 - raised by future.result()
            future.set_exception(error)

    threading.Thread(target=_run, name=f"part {part.number}", daemon=True).start()
    return future
